"""The pruning plan: which units of which group are removed; two plans compared.

A plan is written as JSON and read back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import TraceError
from prunekit.graph import CouplingGraph

FORMAT = 1


class PruningPlan:
    """The units that are removed from each group.

    `removed` maps the name of a group to the indices of its units, rising; groups from which
    nothing is removed are left out.

    Args:
        removed: name of a group → unit indices, each once, in any order.
        fingerprint: the fingerprint of the graph that the plan was made for, where it is known.

    Raises:
        TraceError: a unit is removed twice.
    """

    def __init__(
        self, removed: Mapping[str, Iterable[int]], fingerprint: str | None = None
    ) -> None:
        units = {name: [int(u) for u in indices] for name, indices in removed.items()}
        for name, indices in units.items():
            if len(set(indices)) != len(indices):
                raise TraceError(f"{name}: the plan removes a unit twice: {sorted(indices)}")
        self.removed: dict[str, list[int]] = {
            name: sorted(indices) for name, indices in units.items() if indices
        }
        self.fingerprint = fingerprint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PruningPlan) and self.removed == other.removed

    def __repr__(self) -> str:
        units = sum(map(len, self.removed.values()))
        return f"PruningPlan({units} units of {len(self.removed)} groups)"

    def check(self, graph: CouplingGraph) -> None:
        """Check that the plan fits a graph.

        Raises:
            TraceError: the graph is another model's, has no such group, the group can't be pruned,
                an index is out of range, or no unit would stay of a group that can't go as a whole.
        """
        if self.fingerprint and self.fingerprint != graph.fingerprint:
            raise TraceError(
                f"the plan was made for model {self.fingerprint}, this one is {graph.fingerprint}"
            )
        for name, units in self.removed.items():
            group = graph[name]
            if not group.prunable:
                raise TraceError(f"{name}: not prunable: {group.reason}")
            if units[0] < 0 or units[-1] >= group.num_units:
                raise TraceError(
                    f"{name}: units must lie in [0, {group.num_units}), "
                    f"got {units[0]} to {units[-1]}"
                )
            if len(units) == group.num_units and group.must_stay:
                raise TraceError(
                    f"{name}: at least one of {group.num_units} units must stay: {group.must_stay}"
                )

    def to_json(self) -> str:
        """The plan as JSON text."""
        return (
            json.dumps({"format": FORMAT, "fingerprint": self.fingerprint, "removed": self.removed})
            + "\n"
        )

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read the text that `to_json` wrote.

        Raises:
            TraceError: the text is something else.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"plan: not a pruning plan: {error}") from error
        if not isinstance(content, dict) or "format" not in content:
            raise TraceError("plan: not a pruning plan: expected an object with a format")
        if type(version := content["format"]) is not int or version != FORMAT:
            raise TraceError(
                f"plan: expected format {FORMAT}, got {version!r:.40}: "
                "made by another version of prunekit"
            )
        if not {"removed", "fingerprint"} <= content.keys():
            raise TraceError("plan: not a pruning plan: expected removed and fingerprint")
        removed, fingerprint = content["removed"], content["fingerprint"]
        if not (isinstance(removed, dict) and all(map(_is_units, removed.values()))):
            raise TraceError(
                "plan: not a pruning plan: removed: expected group name → list of unit numbers"
            )
        if not isinstance(fingerprint, str | None):
            raise TraceError(
                f"plan: not a pruning plan: fingerprint: expected a text, got {fingerprint!r:.40}"
            )
        return cls(removed, fingerprint)

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan file.

        Raises:
            TraceError: the file can't be read, or holds no plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise TraceError(f"{path}: can't read the plan: {error.strerror}") from error
        except ValueError as error:
            raise TraceError(f"{path}: not a pruning plan: {error}") from error
        try:
            return cls.from_json(text)
        except TraceError as error:
            raise TraceError(f"{path}: {str(error).removeprefix('plan: ')}") from error


def _is_units(value: Any) -> bool:
    return isinstance(value, list) and all(type(unit) is int and unit >= 0 for unit in value)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """The units of one group that two plans remove.

    Attributes:
        group: the name of the group; "all" for all groups together.
        first: how many units the first plan removes.
        second: how many the second plan removes.
        both: how many of them are the same.
        jaccard: `both` over the number of units that either plan removes, in [0, 1].
        only_first: the units that only the first plan removes; None for all groups together.
        only_second: the units that only the second plan removes; None for all groups together.
    """

    group: str
    first: int
    second: int
    both: int
    jaccard: float
    only_first: list[int] | None = None
    only_second: list[int] | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object; what is None is left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def compare_plans(first: PruningPlan, second: PruningPlan) -> list[Overlap]:
    """Compare two plans: a row for each group that either cuts, and one for all groups."""
    names = sorted({*first.removed, *second.removed}, key=_sort_naturally)
    rows = [_compare_group(name, first, second) for name in names]
    counts = [sum(row.first for row in rows), sum(row.second for row in rows)]
    both = sum(row.both for row in rows)
    either = sum(counts) - both
    share = both / either if either else 1.0
    return [
        *rows,
        Overlap(group="all", first=counts[0], second=counts[1], both=both, jaccard=share),
    ]


def _compare_group(name: str, first: PruningPlan, second: PruningPlan) -> Overlap:
    one, other = set(first.removed.get(name, ())), set(second.removed.get(name, ()))
    return Overlap(
        group=name,
        first=len(one),
        second=len(other),
        both=len(one & other),
        jaccard=len(one & other) / len(one | other),
        only_first=sorted(one - other),
        only_second=sorted(other - one),
    )


def _sort_naturally(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
