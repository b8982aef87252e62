"""Apply a plan: cut the model, check it, and put it back where the check fails."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from prunekit.errors import SurgeryError
from prunekit.graph import CouplingGraph
from prunekit.plan import PruningPlan
from prunekit.surgery.attempts import cut_until_right, try_cut
from prunekit.surgery.check import Fault, expect
from prunekit.surgery.cut import cut_model

Removed = Mapping[str, list[int]]


def apply_plan(model: nn.Module, graph: CouplingGraph, plan: PruningPlan) -> None:
    """Remove the plan's units from the model, in place.

    Slices parameters, their gradients and buffers (tied ones once), sets the attributes modules
    read while they run, and gives each layer its own view of the config; whole layers (units of
    `graph.stacks`) leave their list, and what counts layers follows. Then the cut model's outputs
    on the graph's example inputs must equal the uncut model's with the units' consumer columns
    zeroed and the layers passed over, and traced again it must have as many units as were left.
    Groups the tracer calls inexact must leave outputs of the right shape; those cut beside them are
    checked without them first. On meta only the units are counted.

    Raises:
        TraceError: the plan doesn't fit the graph.
        DataError: the uncut model's outputs hold NaN or infinity.
        SurgeryError: the outputs differ; the model is as it was, and the message names the group.
    """
    plan.check(graph)
    if not plan.removed:
        return
    on_meta = _is_on_meta(model)
    exact = {name: units for name, units in plan.removed.items() if graph[name].exact}
    if len(exact) == len(plan.removed):
        expectation = expect(model, graph, plan.removed)
        fault = cut_until_right(partial(cut_model, model, graph, plan.removed), expectation.check)
    else:
        if exact and not on_meta:
            _check_alone(model, graph, exact)
        fault = _cut_once(model, graph, plan.removed)
    if fault:
        raise _refusal(model, graph, plan.removed, fault)


def _is_on_meta(model: nn.Module) -> bool:
    on_meta = {parameter.is_meta for parameter in model.parameters()}
    if len(on_meta) > 1:
        raise SurgeryError(
            "some weights are on the meta device (offloaded?): expected all of them loaded, or none"
        )
    return any(on_meta)


def _check_alone(model: nn.Module, graph: CouplingGraph, exact: Removed) -> None:
    """Cut the exact groups, check them, and put them back.

    Once inexact groups are cut as well, only the shapes of the outputs can be compared.
    """
    expectation = expect(model, graph, exact)
    changes, fault = try_cut(partial(cut_model, model, graph, exact), expectation.check)
    if fault and fault.runs:  # exact groups may not run without the inexact ones
        raise _refusal(model, graph, exact, fault)
    if changes:
        changes.undo()


def _cut_once(model: nn.Module, graph: CouplingGraph, removed: Removed) -> Fault | None:
    """Cut without guesses: a check that compares shapes alone can't tell a wrong guess."""
    expectation = expect(model, graph, removed)
    return try_cut(partial(cut_model, model, graph, removed), expectation.check)[1]


def _refusal(
    model: nn.Module, graph: CouplingGraph, removed: Removed, fault: Fault
) -> SurgeryError:
    """The error; it names the first group that fails when it is cut alone, or else all groups."""
    culprit = fault.group or _find_culprit(model, graph, removed)
    hint = ""
    if graph[culprit or next(iter(removed))].kind == "head_dim":
        hint = "; a module with one width for queries, keys and values needs as many of each cut"
    return SurgeryError(
        f"{culprit or ', '.join(removed)}: {fault.text}; the model was put back{hint}"
    )


def _find_culprit(model: nn.Module, graph: CouplingGraph, removed: Removed) -> str | None:
    """The first group that, cut alone, does not leave the masked model's outputs."""
    for name, units in removed.items():
        alone = {name: units}
        expectation = expect(model, graph, alone)
        changes, fault = try_cut(partial(cut_model, model, graph, alone), expectation.check_outputs)
        if fault:
            return name
        if changes:
            changes.undo()
    return None
