"""Groups whose inputs can't be observed, found before calibration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from prunekit.calibration.consumers import (
    Consumer,
    find_consumers,
    find_unseen,
    running_experts_in_turn,
)
from prunekit.compensation.base import Compensation
from prunekit.errors import TraceError
from prunekit.graph import CouplingGraph, Group
from prunekit.surgery.masking import run_example


def find_misfits(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    compensation: Compensation | None = None,
) -> dict[str, TraceError]:
    """Find the groups without a linear consumer, or with one whose inputs nothing shows.

    The model runs on the graph's example where a module of one's own computes a product, unless its
    weights are on meta.

    Args:
        model: the model.
        graph: its graph.
        groups: groups of it; those whose units are whole modules have no consumer.
        compensation: what repairs the consumers: one that adds biases needs modules that take them.

    Returns:
        Name of a group → what is wrong with it.
    """
    errors: dict[str, TraceError] = {}
    owners: dict[Consumer, str] = {}
    for group in groups:
        try:
            owners |= dict.fromkeys(find_consumers(model, group), group.name)
        except TraceError as error:
            errors[group.name] = error
    for consumer, group_name in owners.items():
        if compensation and compensation.adds_biases and not consumer.can_be_biased:
            errors[group_name] = TraceError(
                f"{group_name}: expected modules that add a bias, {consumer.name or 'the model'} "
                f"adds none to its product with {consumer.member.parameter}"
            )
    if not any(parameter.is_meta for parameter in model.parameters()):
        with running_experts_in_turn(model, list(owners)):
            unseen = find_unseen(list(owners), partial(run_example, model, graph))
        for consumer in unseen:
            group_name = owners[consumer]
            errors[group_name] = TraceError(
                f"{group_name}: layer-wise pruning expects a product by linear, matmul or addmm, "
                f"{consumer.member.parameter} is multiplied by in another way"
            )
    return errors
