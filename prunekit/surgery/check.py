"""Cut by a plan and check the result: the cut model must compute what the masked model computes, or
all is undone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.errors import DataError, SurgeryError, TraceError
from prunekit.graph import CouplingGraph, trace
from prunekit.plan import PruningPlan
from prunekit.surgery.cut import _Surgery
from prunekit.surgery.layers import surviving
from prunekit.surgery.masking import masked_outputs, run_example

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


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
    on_meta = {p.is_meta for p in model.parameters()}
    if len(on_meta) > 1:
        raise SurgeryError(
            "some weights are on the meta device (offloaded?): expected all of them loaded, or none"
        )
    exact = {name: units for name, units in plan.removed.items() if graph[name].exact}
    if exact and len(exact) < len(plan.removed) and not on_meta.pop():
        surgery, problem = _attempt(model, graph, exact)
        if problem and problem.runs:  # some only run together with the others
            raise _refusal(model, graph, exact, problem)
        surgery.undo()
    surgery, problem = _attempt(model, graph, plan.removed)
    if problem and len(exact) == len(plan.removed):
        surgery, still = _attempt(model, graph, plan.removed, by_value="*")
        names = sorted({name for _, name, _, _ in surgery.guessed})
        while still and names:  # all of them were too many: one by one
            surgery, still = _attempt(model, graph, plan.removed, by_value=names.pop(0))
        problem = problem if still else None
    if problem:
        raise _refusal(model, graph, plan.removed, problem)


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """What is wrong with a cut model, in which group where that is known; whether it runs at all."""

    text: str
    group: str | None = None
    runs: bool = True


def _attempt(
    model: nn.Module,
    graph: CouplingGraph,
    removed: Mapping[str, list[int]],
    by_value: str | None = None,
    count: bool = True,
) -> tuple[_Surgery, _Problem | None]:
    """Cut; with None, or with what is wrong after undoing it; `count`: also trace the result and
    count units.
    """
    on_meta = next(model.parameters()).is_meta
    expected = [] if on_meta else masked_outputs(model, graph, removed)
    if not all(torch.isfinite(output).all() for output in expected):
        raise DataError("the model's outputs hold NaN or infinity before anything is cut")
    surgery = _Surgery(model, graph, by_value)

    def check() -> _Problem | None:
        got = [] if on_meta else run_example(model, graph)
        problem = _difference(expected, got, all(graph[name].exact for name in removed))
        return problem or (_misread(model, graph, removed) if count else None)

    def cut() -> _Problem | None:
        surgery.cut(removed)
        return check()

    cut_and_checked = False
    try:
        problem = _tried(cut)
        for target, name, old, new in surgery.guessed if not problem else ():
            setattr(target, name, old)  # keep only what is needed
            if _tried(check):
                setattr(target, name, new)
        cut_and_checked = not problem
    finally:
        if not cut_and_checked:
            surgery.undo()
    return surgery, problem


def _tried(action: Callable[[], _Problem | None]) -> _Problem | None:
    """What the action returns; any error of it is a problem too."""
    try:
        return action()
    except Exception as error:
        return _Problem(
            text=f"the cut model doesn't run: {str(error) or type(error).__name__}", runs=False
        )


def _difference(expected: list[Tensor], got: list[Tensor], exact: bool) -> _Problem | None:
    for before, after in zip(expected, got, strict=True):
        if before.shape != after.shape:
            shapes = f"{tuple(after.shape)}, expected {tuple(before.shape)}"
            return _Problem(text=f"the cut model's output has shape {shapes}")
        if not exact:
            continue
        if not before.is_floating_point():
            if not torch.equal(before, after):
                return _Problem(text="the cut model's outputs differ from the masked model's")
            continue
        scale = before.float().abs().max().clamp_min(1e-30)
        error = ((before.float() - after.float()).abs().max() / scale).item()
        if not error <= TOLERANCE.get(before.dtype, 1e-3):
            text = f"the cut model's outputs differ from the masked model's by {error:.2g} of their size"
            return _Problem(text=text)
    return None


def _misread(
    model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]
) -> _Problem | None:
    """A group of which the cut model, traced again, has another number of units; sees what small
    outputs hide.
    """
    try:
        again = trace(model, graph.example_inputs)
    except (
        TraceError
    ) as error:  # a model that runs may have hooks that can't be traced: its outputs must do
        return _Problem(text=str(error)) if next(model.parameters()).is_meta else None
    found: dict[frozenset[tuple[str, int]], set[int]] = defaultdict(set)
    for group in again.groups:
        found[frozenset((m.parameter, m.dim) for m in group.members)].add(group.num_units)
    names = graph.names_after(removed)
    reasons = {stack.module: stack.reason for stack in again.stacks}
    for stack in graph.stacks:
        if stack.name in removed and (reason := reasons.get(stack.module)):
            return _Problem(text=reason, group=stack.name)
    for name, units in surviving(graph, removed).items():
        left = graph[name].num_units - len(units)
        members = [m for m in graph[name].members if m.parameter in names]
        sizes = found[frozenset((names[m.parameter], m.dim) for m in members)]
        if left > 1 and left not in sizes:
            return _Problem(
                text=f"the cut model reads {sorted(sizes)} units where {left} were left", group=name
            )
    return None


def _refusal(
    model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]], problem: _Problem
) -> SurgeryError:
    """The error, with the first group that, cut alone, does not leave the masked model's outputs;
    or all of them.
    """
    culprit = problem.group
    for name, units in removed.items() if culprit is None else ():
        surgery, alone = _attempt(model, graph, {name: units}, count=False)
        if alone:
            culprit = name
            break
        surgery.undo()
    hint = ""
    if graph[culprit or next(iter(removed))].kind == "head_dim":
        hint = "; a module with one width for queries, keys and values needs as many of each cut"
    return SurgeryError(
        f"{culprit or ', '.join(removed)}: {problem.text}; the model was put back{hint}"
    )
