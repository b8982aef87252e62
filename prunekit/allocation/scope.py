"""What a cut may touch: where units compete, how few may stay, what is left alone, and which widths
are allowed.
"""

from __future__ import annotations

import fnmatch
import math
from collections import defaultdict
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

from prunekit.errors import ConfigError, suggest
from prunekit.graph import Group
from prunekit.graph.groups import Kind

Ranking = Literal["local", "layer", "model"]
RANKINGS = list(get_args(Ranking))


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where and how finely to cut.

    Args:
        ranking: units compete inside their group (local), inside their layer, or across the model;
            across groups they rank by score per unit of what the target counts, so that heads and
            channels compete fairly, and the policy only says what a layer may lose in all (layer)
            or which layers may lose anything (model).
        rounds: score, cut a part, score again.
        min_units: fewest units that stay in a group: one number, or group kind → number.
        exclude: shell patterns over groups, modules and parameters (`layers.0`, `*.mlp`); what
            matches is left alone.
        width_multiple: kept FFN, residual and head widths are multiples
            of it.
        head_multiple: kept heads (KV groups) are multiples of it, for tensor
            parallelism.
    """

    ranking: Ranking = "local"
    rounds: int = 1
    min_units: int | Mapping[str, int] = 1
    exclude: Sequence[str] = ()
    width_multiple: int = 1
    head_multiple: int = 1

    def __post_init__(self) -> None:
        if self.ranking not in RANKINGS:
            raise ConfigError(
                f"scope.ranking: unknown {self.ranking!r}: {suggest(self.ranking, list(get_args(Ranking)))}"
            )
        numbers = {
            "rounds": self.rounds,
            "width_multiple": self.width_multiple,
            "head_multiple": self.head_multiple,
        }
        by_kind = self.min_units if isinstance(self.min_units, Mapping) else {"": self.min_units}
        for key, value in [
            *numbers.items(),
            *((f"min_units.{k}".rstrip("."), v) for k, v in by_kind.items()),
        ]:
            if type(value) is not int or value < 1:
                raise ConfigError(f"scope.{key}: expected a whole number ≥ 1, got {value}")
        for kind in by_kind if isinstance(self.min_units, Mapping) else ():
            if kind not in get_args(Kind):
                raise ConfigError(
                    f"scope.min_units: unknown kind {kind!r}: {suggest(str(kind), list(get_args(Kind)))}"
                )
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", [self.exclude])

    def fewest(self, group: Group) -> int:
        """How many units of a group must stay."""
        return (
            self.min_units.get(group.kind, 1)
            if isinstance(self.min_units, Mapping)
            else self.min_units
        )

    def included(self, groups: Sequence[Group], known: Sequence[Group]) -> list[Group]:
        """The groups no pattern matches; ConfigError for a pattern that matches none of `known`, or
        all of `groups`.
        """
        names = sorted({name for group in known for name in group.pattern_names})
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"scope.exclude: {pattern!r} matches nothing: {suggest(pattern, names)}"
                )
        # A pattern may name single units of a group: they are protected, and the group stays.
        left = [
            group
            for group in groups
            if group.unit_names() or not self._excludes(group.pattern_names)
        ]
        if not left:
            raise ConfigError(f"scope.exclude: {', '.join(self.exclude)} leaves no group to prune")
        return left

    def protected(self, group: Group) -> list[int]:
        """The units of a group that stay whatever they score: layers that a pattern names."""
        return [unit for unit, names in group.unit_names().items() if self._excludes(names)]

    def _excludes(self, names: set[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.exclude)

    def slots(
        self,
        groups: Sequence[Group],
        shares: Mapping[str, float],
        floors: Mapping[str, int] = MappingProxyType({}),
        multiples: Mapping[str, int] = MappingProxyType({}),
        possible: Mapping[str, Container[int]] = MappingProxyType({}),
        uniform: bool = False,
    ) -> list[Slot]:
        """What the budget counts in, for groups with these shares.

        `floors` (group → units that must stay), `multiples` (group → what kept units are a multiple
        of) and `possible` (group → what kept units may be) are the model's own demands, on top of
        the scope's. `uniform`: groups that are alike but for their layer are cut in step.
        """
        found = []
        for bundle in _bundles(groups, uniform):
            coarse = min(bundle, key=lambda g: g.num_units)
            if odd := [g for g in bundle if g.num_units % coarse.num_units]:
                raise ConfigError(
                    f"{odd[0].name}: its {odd[0].num_units} units can't be cut in step with "
                    f"the {coarse.num_units} of {coarse.name}"
                )
            n = coarse.num_units
            ratio = max(g.num_units for g in bundle) // n
            fewest = max(
                max(self.fewest(g), floors.get(g.name, 1)) * n // g.num_units for g in bundle
            )
            fewest = max(fewest, 1, len(self.protected(coarse)))
            multiple = math.lcm(
                self._multiple(coarse, ratio), *(multiples.get(g.name, 1) for g in bundle)
            )
            allowed = [k for k in range(n, min(fewest, n) - 1, -1) if k == n or k % multiple == 0]
            allowed = [
                k
                for k in allowed
                if k == n or all(k in possible.get(g.name, allowed) for g in bundle)
            ]
            share = max(shares[g.name] for g in bundle)
            found.append(
                Slot(
                    groups=tuple(bundle),
                    removed=tuple(n - k for k in (allowed if share > 0 else [n])),
                    factors={g.name: g.num_units // n for g in bundle},
                    share=share,
                )
            )
        return found

    def _multiple(self, group: Group, ratio: int) -> int:
        if group.kind in ("attention", "query_head"):
            return self.head_multiple
        if not group.sets_width:
            return 1
        return max(self.width_multiple // ratio, 1)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Groups cut in step: `removed[s]` units of the coarsest go at step s; `factors` times as many
    of the others.
    """

    groups: tuple[Group, ...]
    removed: tuple[int, ...]
    factors: Mapping[str, int]
    share: float
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.groups[0].name)

    @property
    def num_units(self) -> int:
        """Units of the coarsest group."""
        return min(group.num_units for group in self.groups)

    def counts(self, units: float) -> dict[str, float]:
        """Units removed from each of its groups when this many of the coarsest go."""
        return {name: factor * units for name, factor in self.factors.items()}


def _bundles(groups: Sequence[Group], uniform: bool) -> Iterator[list[Group]]:
    """Groups cut in step: the head widths that one module reads as one number; every other group is
    alone.

    Unless they are to be `uniform`: then those that are alike are cut in step.
    """
    together = uniform or any(group.kind == "head_dim" and group.layer is None for group in groups)
    bundles: dict[Hashable, list[Group]] = defaultdict(list)
    for group in groups:
        if group.kind == "head_dim":
            bundles[None if together else group.layer].append(group)
        else:
            bundles[group.likeness if uniform else group.name].append(group)
    yield from bundles.values()
