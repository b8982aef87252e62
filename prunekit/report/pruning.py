"""What a plan leaves of a model, counted for the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from prunekit.graph import Group
from prunekit.report.parts import KeptUnits, LayerKept


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
