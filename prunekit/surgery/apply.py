"""Apply a plan: cut the model, check it, and put it back where the check fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from prunekit.errors import SurgeryError
from prunekit.graph import CouplingGraph
from prunekit.model.modeling_prunekit import place_in_stack
from prunekit.plan import PruningPlan
from prunekit.surgery.attempts import cut_and_check, cut_until_right, try_cut
from prunekit.surgery.attributes import Attempt
from prunekit.surgery.changes import Changes, Guess
from prunekit.surgery.check import Run, expect, expectations
from prunekit.surgery.counterpart import compare_with_class, find_unshared
from prunekit.surgery.cut import check_one_layer, cut_model
from prunekit.surgery.fault import Fault

Removed = Mapping[str, list[int]]


def apply_plan(model: nn.Module, graph: CouplingGraph, plan: PruningPlan) -> None:
    """Remove the plan's units from the model, in place.

    Slices parameters, their gradients and buffers (tied ones once), sets the attributes modules
    read while they run, and gives each layer its own view of the config; whole layers (units of
    `graph.stacks`) leave their list, and what counts layers follows. Then, on the graph's example
    inputs and in float32 (float64 for a model of float64), the cut model must compute what the
    uncut model does with the units' consumer columns zeroed and the layers passed over: what goes
    into each layer and each consumer and what comes out of it, then the outputs. Each layer is fed
    what the masked model's was, so that no rounding adds up. Groups that no such comparison can see
    must have as many units as were left when the model is traced again. Groups the tracer calls
    inexact must leave outputs of the right shape, and hold all that the model's class makes smaller
    with them; those cut beside them are checked without them first. On meta only the units are
    counted.

    Raises:
        TraceError: the plan doesn't fit the graph.
        DataError: the uncut model's outputs hold NaN or infinity.
        SurgeryError: the outputs differ; the model is as it was, and the message names the group.
    """
    plan.check(graph)
    if not plan.removed:
        return
    _apply(model, graph, plan.removed, runs=not _is_on_meta(model))


def apply_to_layer(
    model: nn.Module, graph: CouplingGraph, removed: Removed, run: Callable[[], Tensor]
) -> None:
    """Remove units of one layer's groups from a model of which this layer alone is loaded.

    The layer is checked as `apply_plan` checks a model, but that no unit is counted.

    Args:
        model: what the graph was traced from; this layer not cut yet.
        graph: the graph of the whole dense model.
        removed: name of a group → unit indices, each once; all groups of one layer.
        run: runs the layer on an example; its output.

    Raises:
        TraceError: the units don't fit the graph.
        DataError: the uncut layer's output holds NaN or infinity.
        SurgeryError: the groups are not of one layer, or the outputs differ; the layer is as it
            was, and the message names the group.
    """
    plan = PruningPlan(removed)
    plan.check(graph)
    check_one_layer(model, graph, plan)
    _apply(model, graph, plan.removed, runs=True, run=lambda: [run()])


def _apply(
    model: nn.Module, graph: CouplingGraph, removed: Removed, runs: bool, run: Run | None = None
) -> None:
    """Cut and check; `runs`: whether the model can run, `run`: runs the part that is loaded."""
    exact = {name: units for name, units in removed.items() if graph[name].exact}
    if len(exact) == len(removed):
        fault = cut_and_check(model, graph, removed, run)
    else:
        guesses = _check_alone(model, graph, exact, run) if exact and runs else []
        fault = _cut_once(model, graph, removed, guesses, run)
    if fault:
        raise _refusal(model, graph, removed, fault, run)


def _is_on_meta(model: nn.Module) -> bool:
    on_meta = {parameter.is_meta for parameter in model.parameters()}
    if len(on_meta) > 1:
        raise SurgeryError(
            "some weights are on the meta device (offloaded?): expected all of them loaded, or none"
        )
    return any(on_meta)


def _check_alone(
    model: nn.Module, graph: CouplingGraph, exact: Removed, run: Run | None
) -> list[Guess]:
    """Cut the exact groups, check them, and put them back.

    Once inexact groups are cut as well, only the shapes of the outputs can be compared.

    Returns:
        The guesses without which the model would not compute what it must.
    """
    last: list[Changes] = []

    def cut(attempt: Attempt) -> Changes:
        last[:] = [cut_model(model, graph, exact, attempt)]
        return last[0]

    fault = None
    for expectation in expectations(model, graph, exact, run):
        check = expectation.check if run is None else expectation.check_outputs
        fault = cut_until_right(cut, check, expectation.check_outputs)
        if fault is None:
            last[0].undo()
            return last[0].guesses
        if not fault.runs:  # exact groups may not run without the inexact ones
            return []
    assert fault is not None
    raise _refusal(model, graph, exact, fault, run)


def _cut_once(
    model: nn.Module,
    graph: CouplingGraph,
    removed: Removed,
    guesses: Sequence[Guess],
    run: Run | None,
) -> Fault | None:
    """Cut with these guesses alone: a check that compares shapes can't tell a wrong one.

    What the class makes smaller is looked for where the whole model is cut.
    """
    if run is None and (fault := find_unshared(model, graph, removed)):
        return fault
    expectation = expect(model, graph, removed, run=run)

    def cut() -> Changes:
        changes = cut_model(model, graph, removed)
        for guess in guesses:
            changes.set(guess.target, guess.attribute, guess.new)
        return changes

    def check() -> Fault | None:
        if run is not None:
            return expectation.check_outputs()
        return expectation.check() or compare_with_class(model, graph, removed)

    return try_cut(cut, check)[1]


def _refusal(
    model: nn.Module, graph: CouplingGraph, removed: Removed, fault: Fault, run: Run | None
) -> SurgeryError:
    """The error; it names the first group that fails when it is cut alone, or else those near the
    fault.
    """
    near = _groups_near(model, graph, removed, fault)
    culprit = fault.group or _find_culprit(model, graph, removed, near, run)
    hint = ""
    if graph[culprit or next(iter(removed))].kind == "head_dim":
        hint = "; a module with one width for queries, keys and values needs as many of each cut"
    return SurgeryError(
        f"{culprit or ', '.join(near or removed)}: {fault.text}; the model was put back{hint}; "
        "scope.exclude leaves groups out of a plan"
    )


def _groups_near(
    model: nn.Module, graph: CouplingGraph, removed: Removed, fault: Fault
) -> list[str]:
    """The groups in the layer where a fault was seen."""
    if fault.path is None:
        return []
    layer = place_in_stack(model, fault.path)
    return [name for name in removed if place_in_stack(model, graph[name].module) == layer]


def _find_culprit(
    model: nn.Module,
    graph: CouplingGraph,
    removed: Removed,
    near: Sequence[str],
    run: Run | None,
) -> str | None:
    """The first group that, cut alone, leaves another model than the masked one."""
    last: list[Changes] = []

    def cut(alone: Removed, attempt: Attempt) -> Changes:
        last[:] = [cut_model(model, graph, alone, attempt)]
        return last[0]

    for name in sorted(removed, key=lambda name: name not in near):
        alone = {name: removed[name]}
        expectation = expect(model, graph, alone, run=run)
        if cut_until_right(partial(cut, alone), expectation.check_outputs):
            return name
        last[0].undo()
    return None
