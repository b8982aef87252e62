"""What a plan leaves of a model, counted for the report."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from prunekit.graph import Group
from prunekit.report.parts import KeptUnits, LayerKept, LeftOut


def count_units(
    groups: Sequence[Group], removed: Mapping[str, Collection[int]]
) -> tuple[LayerKept, ...]:
    """Count the units that each layer keeps, by kind; groups outside of layers stand by name.

    Args:
        groups: the groups that could be cut.
        removed: group → the units that are gone.
    """
    layers: dict[int | None, dict[str, KeptUnits]] = {}
    for group in groups:
        kinds = layers.setdefault(group.layer, {})
        kind = group.kind if group.layer is not None else group.name
        # A layer may hold two groups of a kind: shared and routed experts.
        before = kinds.get(kind, KeptUnits(kept=0, total=0))
        kept = group.num_units - len(removed.get(group.name, ()))
        kinds[kind] = KeptUnits(kept=before.kept + kept, total=before.total + group.num_units)
    return tuple(LayerKept(index=index, kinds=kinds) for index, kinds in layers.items())


def gather_left_out(groups: Iterable[Group]) -> tuple[LeftOut, ...]:
    """Gather those of these groups that are not prunable by their reason.

    Groups like each other in several layers are one entry where a pattern names them and no group
    that can be pruned.
    """
    groups = list(groups)
    taken = set[str]().union(*(group.pattern_names for group in groups if group.prunable))
    alike = Counter(_find_entry(group, taken) for group in groups if not group.prunable)
    return tuple(
        LeftOut(groups=pattern, count=count, reason=reason)
        for (pattern, reason), count in alike.items()
    )


def _quote(patterns: Iterable[str]) -> str:
    return ",".join(dict.fromkeys(f'"{pattern}"' for pattern in patterns))


def _find_entry(group: Group, taken: Collection[str]) -> tuple[str, str]:
    """A group's pattern, and its reason; the layer is left open in both or in none of them."""
    pattern, reason = _find_pattern(group, taken), group.reason or ""
    if "*" in pattern:
        reason = re.sub(rf"(?<=[a-z])\.{group.layer}\.(?=[a-z])", ".*.", reason)
    return pattern, reason


def _find_pattern(group: Group, taken: Collection[str]) -> str:
    """The pattern of `scope.exclude` that names a group and as many like it as it can.

    It matches none of the names in `taken`, or is the group's name where every pattern does.
    """
    own = [group.name, *sorted(member.parameter for member in group.members)]
    for pattern in [*(_over_layers(name, group.layer) for name in own), *own]:
        if not fnmatch.filter(taken, pattern):
            return pattern
    return group.name


def _over_layers(name: str, layer: int | None) -> str:
    """The pattern of a name in any layer, given the index of the layer that it names."""
    if layer is None:
        return name
    return re.sub(rf"(^|\.){layer}(\.|$)", r"\1*\2", name, count=1)


def tell_left_out(left_out: Sequence[LeftOut]) -> list[str]:
    """Lines for a terminal that tell which groups stay whole, and how to leave them out unasked."""
    if not left_out:
        return []
    width = max(len(entry.groups) for entry in left_out)
    rows = [f"  {entry.groups:{width}}  {entry.count:3} ×  {entry.reason}" for entry in left_out]
    patterns = _quote(entry.groups for entry in left_out)
    return [
        "these groups can't be cut and stay whole:",
        *rows,
        f"  (what else is to stay whole goes into scope.exclude, as in scope.exclude=[{patterns}])",
    ]
