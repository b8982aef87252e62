"""Slots: what the budget counts in. A slot is one group, or several that are cut in step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from prunekit.allocation.scope import Scope
from prunekit.errors import ConfigError
from prunekit.graph import Group


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What the model itself demands of a cut, beside the demands of the scope.

    Args:
        floors: group → how many units must stay.
        multiples: group → the number that divides the number of its kept units.
        possible: group → which numbers of kept units are possible; any where it has no entry.
        uniform: groups that differ in nothing but their layer are cut in step.
    """

    floors: Mapping[str, int] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)
    possible: Mapping[str, Container[int]] = field(default_factory=dict)
    uniform: bool = False


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Groups that are cut in step.

    Args:
        groups: in execution order; the first one names the slot.
        removed: how many units of the coarsest group are gone at step 0, 1, …; rises from 0.
        factors: group → how many of its units go with one unit of the coarsest group.
        share: the share of its units that the policy gives the slot.
    """

    groups: tuple[Group, ...]
    removed: tuple[int, ...]
    factors: Mapping[str, int]
    share: float

    @property
    def name(self) -> str:
        """The name of the first group."""
        return self.groups[0].name

    @property
    def num_units(self) -> int:
        """Units of the coarsest group."""
        return min(group.num_units for group in self.groups)

    def counts(self, units: float) -> dict[str, float]:
        """Group → units removed from it when this many of the coarsest group go."""
        return {name: factor * units for name, factor in self.factors.items()}


def make_slots(
    scope: Scope,
    groups: Sequence[Group],
    shares: Mapping[str, float],
    demands: Demands = Demands(),
) -> list[Slot]:
    """The slots of groups with these shares, with the steps that the scope and the model allow.

    Raises:
        ConfigError: groups must be cut in step whose numbers of units don't allow it.
    """
    slots = []
    for bundle in _bundle_groups(groups, demands.uniform):
        coarsest = min(bundle, key=lambda group: group.num_units)
        share = max(shares[group.name] for group in bundle)
        total = coarsest.num_units
        kept = _allowed_counts(scope, bundle, coarsest, demands) if share > 0 else [total]
        slots.append(
            Slot(
                groups=tuple(bundle),
                removed=tuple(total - count for count in kept),
                factors={group.name: group.num_units // total for group in bundle},
                share=share,
            )
        )
    return slots


def _allowed_counts(
    scope: Scope, bundle: Sequence[Group], coarsest: Group, demands: Demands
) -> list[int]:
    """How many units of the coarsest group may stay, falling from all of them."""
    total = coarsest.num_units
    finest = max(group.num_units for group in bundle) // total
    fewest = max(1, len(scope.protected_units(coarsest)))
    multiple = scope.multiple(coarsest, finest)
    for group in bundle:
        floor = max(scope.fewest(group), demands.floors.get(group.name, 1))
        fewest = max(fewest, floor * total // group.num_units)
        multiple = math.lcm(multiple, demands.multiples.get(group.name, 1))
    possible = [demands.possible[g.name] for g in bundle if g.name in demands.possible]
    cut = [
        count
        for count in range(total - 1, fewest - 1, -1)
        if count % multiple == 0 and all(count in counts for counts in possible)
    ]
    return [total, *cut]


def _bundle_groups(groups: Sequence[Group], uniform: bool) -> list[list[Group]]:
    """Groups that are cut in step; most are alone.

    The widths of heads that one module reads as one number go together; if `uniform`, so do groups
    that differ in nothing but their layer.
    """
    one_width = uniform or any(group.kind == "head_dim" and group.layer is None for group in groups)
    bundles: dict[Hashable, list[Group]] = defaultdict(list)
    for group in groups:
        if group.kind == "head_dim":
            bundles[None if one_width else group.layer].append(group)
        else:
            bundles[group.likeness if uniform else group.name].append(group)
    for bundle in bundles.values():
        _check_in_step(bundle)
    return list(bundles.values())


def _check_in_step(bundle: Sequence[Group]) -> None:
    coarsest = min(bundle, key=lambda group: group.num_units)
    for group in bundle:
        if group.num_units % coarsest.num_units:
            raise ConfigError(
                f"{group.name}: its {group.num_units} units can't be cut in step with the "
                f"{coarsest.num_units} of {coarsest.name}"
            )
