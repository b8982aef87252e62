"""The scope of a cut: where units compete, how few stay, what is left alone, which widths fit."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from prunekit.errors import ConfigError, expect_one_of, suggest
from prunekit.graph import Group
from prunekit.graph.groups import Kind

Ranking = Literal["local", "layer", "model"]


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where and how finely to cut.

    Args:
        ranking: units compete inside their group (local), inside their layer, or across the model.
            Across groups they rank by score per unit of cost, so that heads and channels compete
            fairly; the policy then only says what a layer may lose in all (layer), or which layers
            may lose anything (model).
        rounds: how often units are scored and a part of them cut.
        min_units: fewest units that stay in a group: one number, or group kind → number. With 0 a
            sublayer may go; where a group can't lose all of its units, one stays. None leaves it to
            the policy: 0 with one that empties groups (`Policy.empties`), else 1.
        exclude: shell patterns over groups, modules and parameters (`layers.0`, `*.mlp`); what
            matches is left alone.
        width_multiple: the width of every matrix that is cut, and of its heads where they are cut,
            is a multiple of it; None leaves the widths to `shapes`.
        head_multiple: kept heads (KV groups) are multiples of it.
        tensor_parallel: how many devices will share each layer: kept heads (KV groups) and FFN
            channels are multiples of it.
    """

    ranking: Ranking = "local"
    rounds: int = 1
    min_units: int | Mapping[str, int] | None = None
    exclude: Sequence[str] = ()
    width_multiple: int | None = None
    head_multiple: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        expect_one_of("scope.ranking", self.ranking, get_args(Ranking))
        for key in ("rounds", "head_multiple", "tensor_parallel"):
            _expect_whole(key, getattr(self, key))
        if self.width_multiple is not None:
            _expect_whole("width_multiple", self.width_multiple)
        if isinstance(self.min_units, Mapping):
            for kind, number in self.min_units.items():
                _expect_whole(f"min_units.{kind}", number, least=0)
                expect_one_of("scope.min_units", kind, get_args(Kind), "kind ")
        elif self.min_units is not None:
            _expect_whole("min_units", self.min_units, least=0)
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", [self.exclude])
        listed = isinstance(self.exclude, Sequence)
        if not listed or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ConfigError(
                "scope.exclude: expected a list of patterns such as layers.0 or *.mlp, got "
                f"{self.exclude!r}"
            )

    def fewest(self, group: Group) -> int:
        """How many units of a group must stay."""
        if isinstance(self.min_units, Mapping):
            return self.min_units.get(group.kind, 1)
        return 1 if self.min_units is None else self.min_units

    def select_groups(self, groups: Sequence[Group], known: Sequence[Group]) -> list[Group]:
        """The groups that no pattern matches.

        A pattern that names single units of a group protects these: the group stays.

        Raises:
            ConfigError: a pattern matches none of the `known` groups, or no group is left.
        """
        names = sorted({name for group in known for name in group.pattern_names})
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"scope.exclude: {pattern!r} matches nothing: {suggest(pattern, names)}"
                )
        selected = [group for group in groups if not self.leaves_whole(group)]
        if not selected:
            raise ConfigError(f"scope.exclude: {', '.join(self.exclude)} leaves no group to prune")
        return selected

    def leaves_whole(self, group: Group) -> bool:
        """Whether a pattern names a group, and not single units of it."""
        return not group.unit_names() and self._excludes(group.pattern_names)

    def protected_units(self, group: Group) -> list[int]:
        """The units of a group that stay whatever they score: layers that a pattern names."""
        return [unit for unit, names in group.unit_names().items() if self._excludes(names)]

    def _excludes(self, names: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.exclude)


def _expect_whole(key: str, value: object, least: int = 1) -> None:
    if type(value) is not int or value < least:
        raise ConfigError(f"scope.{key}: expected a whole number ≥ {least}, got {value}")
