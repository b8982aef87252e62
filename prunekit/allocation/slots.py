"""Slots: what the budget counts in. A slot is one group, or several that are cut in step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from prunekit.allocation.scope import Scope
from prunekit.errors import ConfigError
from prunekit.graph import Group
from prunekit.surgery.shapes import FINENESS


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What is demanded of the numbers of units that stay, beside the minima of the scope.

    Args:
        floors: group → how many units must stay; one where it has no entry.
        multiples: group → the number that divides the number of its kept units.
        steps: group → a power of two that should divide it as well, where enough numbers are left.
        possible: group → which numbers of kept units are possible; any where it has no entry.
        uniform: groups that differ in nothing but their layer are cut in step.
    """

    floors: Mapping[str, int] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    possible: Mapping[str, Container[int]] = field(default_factory=dict)
    uniform: bool = False


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Groups that are cut in step.

    Args:
        groups: in execution order; the first one names the slot.
        removed: how many units of the coarsest group are gone at step 0, 1, …; rises from 0.
        multiple: divides the number of units of the coarsest group that stay, unless all stay.
        factors: group → how many of its units go with one unit of the coarsest group.
        share: the share of its units that the policy gives the slot.
    """

    groups: tuple[Group, ...]
    removed: tuple[int, ...]
    multiple: int
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
        kept, multiple = _allowed_counts(scope, bundle, coarsest, demands)
        slots.append(
            Slot(
                groups=tuple(bundle),
                removed=(0, *(total - count for count in kept if share > 0)),
                multiple=multiple,
                factors={group.name: group.num_units // total for group in bundle},
                share=share,
            )
        )
    return slots


def gather_steps(slots: Sequence[Slot]) -> dict[str, int]:
    """Kind of group → the number that divides the units that stay in each that is cut."""
    steps: dict[str, int] = {}
    for slot in slots:
        for group in slot.groups:
            own = slot.multiple * slot.factors[group.name]
            steps[group.kind] = math.gcd(steps.get(group.kind, own), own)
    return steps


def _allowed_counts(
    scope: Scope, bundle: Sequence[Group], coarsest: Group, demands: Demands
) -> tuple[list[int], int]:
    """How many units of the coarsest group may stay, falling, if not all; what divides them."""
    total = coarsest.num_units
    fewest = len(scope.protected_units(coarsest))
    multiple = step = 1
    for group in bundle:
        factor = group.num_units // total
        floor = max(scope.fewest(group), demands.floors.get(group.name, 1))
        fewest = max(fewest, -(-floor // factor))
        multiple = math.lcm(multiple, _per_unit(demands.multiples.get(group.name, 1), factor))
        step = math.lcm(step, _per_unit(demands.steps.get(group.name, 1), factor))
    possible = [demands.possible[g.name] for g in bundle if g.name in demands.possible]
    counts = [
        count
        for count in range(total - 1, fewest - 1, -1)
        if count % multiple == 0 and all(count in choice for choice in possible)
    ]
    while not _is_fine(total, [count for count in counts if count % step == 0]) and step > 1:
        step //= 2
    return [count for count in counts if count % step == 0], math.lcm(multiple, step)


def _per_unit(multiple: int, factor: int) -> int:
    """What divides a number, if `multiple` divides `factor` times that number."""
    return multiple // math.gcd(multiple, factor)


def _is_fine(total: int, counts: Sequence[int]) -> bool:
    """Whether there are such numbers of units, and no two are further apart than steps may be."""
    gaps = [more - less for more, less in pairwise([total, *counts])]
    return bool(gaps) and max(gaps) * FINENESS <= total


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
