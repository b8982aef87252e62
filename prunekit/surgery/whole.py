"""Which groups can lose all of their units: found out before work begins, on a copy on meta."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from prunekit.errors import SurgeryError
from prunekit.graph import CouplingGraph, Group
from prunekit.graph.capture import meta_copy
from prunekit.graph.groups import sort_by_likeness
from prunekit.plan import PruningPlan
from prunekit.surgery.apply import apply_plan


def find_obstacles(
    model: nn.Module, graph: CouplingGraph, groups: Sequence[Group]
) -> dict[str, str]:
    """Tell which groups can't lose all of their units.

    Those that the tracer allows it are cut from a copy without weights, all at once; where that
    fails, one after another, and one group stands for all that are like it.

    Returns:
        Name of a group → why a unit must stay.
    """
    reasons = {group.name: group.must_stay for group in groups if group.must_stay}
    left = [group for group in groups if group.name not in reasons]
    if left and _try_without(model, graph, left):
        for alike in sort_by_likeness(left).values():
            if reason := _try_without(model, graph, alike[:1]):
                reasons.update({group.name: reason for group in alike})
    return reasons


def _try_without(model: nn.Module, graph: CouplingGraph, groups: Sequence[Group]) -> str | None:
    """What is wrong with the model where these groups have no units left; None: nothing."""
    plan = PruningPlan({group.name: range(group.num_units) for group in groups})
    try:
        apply_plan(meta_copy(model), graph, plan)
    except SurgeryError as error:
        return str(error)
    return None
