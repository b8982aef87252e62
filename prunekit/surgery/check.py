"""Checks of a cut model: it must compute the outputs of the masked model.

How the model was cut plays no part here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.errors import DataError, TraceError
from prunekit.graph import CouplingGraph, trace
from prunekit.surgery.layers import leave_out_dropped
from prunekit.surgery.masking import masked_outputs, run_example

# The largest difference of two outputs, as a share of the largest number in the expected one.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}

Check = Callable[[], "Fault | None"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with a cut model.

    Args:
        text: the fault in words.
        group: the name of the group where it lies, if that is known.
        runs: whether the cut model runs at all.
    """

    text: str
    group: str | None = None
    runs: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Expectation:
    """The outputs and the numbers of units that a model must have after a cut.

    Args:
        model: the model, before or after the cut.
        graph: the graph of the uncut model.
        removed: name of a group → unit indices.
        outputs: the masked model's output tensors; empty for a model on meta.
    """

    model: nn.Module
    graph: CouplingGraph
    removed: Mapping[str, list[int]]
    outputs: Sequence[Tensor]

    def check_outputs(self) -> Fault | None:
        """Compare the outputs of the cut model with the masked model's."""
        outputs = [] if _is_on_meta(self.model) else run_example(self.model, self.graph)
        exact = all(self.graph[name].exact for name in self.removed)
        return compare_outputs(self.outputs, outputs, exact)

    def check(self) -> Fault | None:
        """Compare the outputs, then trace the cut model again and count its units."""
        return self.check_outputs() or count_units(self.model, self.graph, self.removed)


def expect(model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]) -> Expectation:
    """Run the masked model: to be called before the model is cut.

    Raises:
        DataError: the outputs hold NaN or infinity.
    """
    outputs = [] if _is_on_meta(model) else masked_outputs(model, graph, removed)
    if not all(torch.isfinite(output).all() for output in outputs):
        raise DataError("the model's outputs hold NaN or infinity before anything is cut")
    return Expectation(model=model, graph=graph, removed=removed, outputs=outputs)


def catch_fault(action: Check) -> Fault | None:
    """Return what a check returns; any error of it is a fault too."""
    try:
        return action()
    except Exception as error:
        reason = str(error) or type(error).__name__
        return Fault(text=f"the cut model doesn't run: {reason}", runs=False)


def compare_outputs(
    expected: Sequence[Tensor], outputs: Sequence[Tensor], exact: bool
) -> Fault | None:
    """Compare the outputs of the cut model with the expected ones, tensor by tensor.

    Args:
        expected: output tensors of the masked model.
        outputs: as many of the cut model.
        exact: whether the numbers must agree, and not the shapes alone.
    """
    for masked, cut in zip(expected, outputs, strict=True):
        if masked.shape != cut.shape:
            shapes = f"{tuple(cut.shape)}, expected {tuple(masked.shape)}"
            return Fault(text=f"the cut model's output has shape {shapes}")
        if exact and (difference := _describe_difference(masked, cut)):
            return Fault(text=f"the cut model's outputs differ from the masked model's{difference}")
    return None


def _describe_difference(expected: Tensor, output: Tensor) -> str | None:
    """By how much two tensors of one shape differ, in words; None where they agree."""
    if not expected.is_floating_point():
        return None if torch.equal(expected, output) else ""
    scale = expected.float().abs().max().clamp_min(1e-30)
    error = ((expected.float() - output.float()).abs().max() / scale).item()
    if error <= TOLERANCE.get(expected.dtype, 1e-3):
        return None
    return f" by {error:.2g} of their size"  # NaN too, which is no smaller than anything


def count_units(
    model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]
) -> Fault | None:
    """Trace the cut model and look for a group that has another number of units than were left.

    This finds mistakes whose effect on the outputs is too small. A model that can't be traced again
    passes if it was run, because its outputs were compared.
    """
    try:
        again = trace(model, graph.example_inputs)
    except TraceError as error:  # the model may have hooks that can't be traced
        return Fault(text=str(error)) if _is_on_meta(model) else None
    return _check_stacks(graph, again, removed) or _check_groups(graph, again, removed)


def _check_stacks(
    graph: CouplingGraph, again: CouplingGraph, removed: Mapping[str, list[int]]
) -> Fault | None:
    """A shortened stack that can't be pruned any more has lost its order or its config's count."""
    reasons = {stack.module: stack.reason for stack in again.stacks}
    for stack in graph.stacks:
        if stack.name in removed and (reason := reasons.get(stack.module)):
            return Fault(text=reason, group=stack.name)
    return None


def _check_groups(
    graph: CouplingGraph, again: CouplingGraph, removed: Mapping[str, list[int]]
) -> Fault | None:
    """A group is known again by its members, under the names that they have after the cut."""
    counts: dict[frozenset[tuple[str, int]], set[int]] = defaultdict(set)
    for group in again.groups:
        counts[frozenset((m.parameter, m.dim) for m in group.members)].add(group.num_units)
    names = graph.names_after(removed)
    for name, units in leave_out_dropped(graph, removed).items():
        left = graph[name].num_units - len(units)
        members = [m for m in graph[name].members if m.parameter in names]
        read = counts[frozenset((names[m.parameter], m.dim) for m in members)]
        if left > 1 and left not in read:  # one unit left has no axis, and so no group
            text = f"the cut model reads {sorted(read)} units where {left} were left"
            return Fault(text=text, group=name)
    return None


def _is_on_meta(model: nn.Module) -> bool:
    return next(model.parameters()).is_meta
