"""Checks of a cut model: it must compute what the masked model computes.

Both run on the example in float32 (in float64 where the model is stored so), whatever type the
model is stored in: a type's rounding is never judged. How the model was cut plays no part here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.errors import DataError
from prunekit.graph import CouplingGraph
from prunekit.model.compat import computed_in_any_type
from prunekit.runtime.precision import computing_in, has_narrow
from prunekit.surgery.counting import count_units
from prunekit.surgery.fault import Fault
from prunekit.surgery.masking import masked, run_example
from prunekit.surgery.probes import Mismatch, Recording, Remainder, differ, find_probes

# The largest difference of two tensors, as a share of the largest number in the expected one.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

Check = Callable[[], "Fault | None"]
Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Expectation:
    """What a model must compute, and how many units it must have, after a cut.

    Args:
        model: the model, before or after the cut.
        graph: the graph of the uncut model.
        removed: name of a group → unit indices.
        run: runs the model; its output tensors.
        wide: the type to compute in.
        outputs: the masked model's output tensors; empty for a model on meta.
        recording: what went into the masked model's probes and came out of them.
    """

    model: nn.Module
    graph: CouplingGraph
    removed: Mapping[str, list[int]]
    run: Run
    wide: torch.dtype
    outputs: Sequence[Tensor]
    recording: Recording

    def check_outputs(self) -> Fault | None:
        """Compare the cut model with the masked model, probe by probe, then their outputs."""
        if not _loaded(self.model):
            return None
        try:
            with _computing(self.model, self.wide), self.recording.comparing():
                outputs = self.run()
        except Mismatch as mismatch:
            return Fault(text=mismatch.text, path=mismatch.path)
        tolerance = self.recording.tolerance if _is_exact(self.graph, self.removed) else None
        fault = compare_outputs(self.outputs, outputs, tolerance)
        if fault is None and _computes_otherwise(self.model, self.wide):
            self.run()  # its own kernels may not take its new widths
        return fault

    def check(self) -> Fault | None:
        """Compare the outputs, then count the units of the groups whose consumers were not seen.

        Counting takes a second trace. It finds mistakes whose effect on the outputs is too small; a
        consumer that was fed what it must be fed has as many units as it must have.
        """
        return self.check_outputs() or count_units(
            self.model, self.graph, self.removed, self.recording.seen
        )


def expect(
    model: nn.Module,
    graph: CouplingGraph,
    removed: Mapping[str, list[int]],
    wide: torch.dtype | None = None,
    run: Run | None = None,
) -> Expectation:
    """Run the masked model: to be called before the model is cut.

    Args:
        model: the model.
        graph: its graph.
        removed: name of a group → unit indices.
        wide: the type to compute in; the narrowest of `precisions` by default.
        run: runs the model, or the part of it that is cut; the whole of it on the graph's example
            by default.

    Raises:
        DataError: the outputs hold NaN or infinity.
    """
    run = run or partial(run_example, model, graph)
    wide = wide or precisions(model)[0]
    compares = removed and _is_exact(graph, removed)
    recording = Recording(
        probes=find_probes(model, graph, removed) if compares else (),
        remainder=Remainder(graph, removed),
        wide=wide,
        tolerance=TOLERANCE[precisions(model)[0]],
    )
    outputs: Sequence[Tensor] = []
    if _loaded(model):
        with masked(model, graph, removed), _computing(model, wide), recording.recording():
            outputs = run()
    if not _are_finite(outputs):
        with _computing(model, wide):
            finite_before = _are_finite(run())
        names = ", ".join(list(removed)[:3])
        raise DataError(
            f"{names}: the model's outputs hold NaN or infinity where units are masked; "
            "scope.exclude leaves groups out"
            if finite_before
            else "the model's outputs hold NaN or infinity before anything is cut"
        )
    return Expectation(
        model=model,
        graph=graph,
        removed=removed,
        run=run,
        wide=wide,
        outputs=outputs,
        recording=recording,
    )


def _are_finite(outputs: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(output).all()) for output in outputs)


def expectations(
    model: nn.Module,
    graph: CouplingGraph,
    removed: Mapping[str, list[int]],
    run: Run | None = None,
) -> Iterator[Expectation]:
    """Yield what the model must compute: in float32, then, for who did not meet that, in float64.

    What differs in float32 must differ in float64 too: rounding does not. The second is left out
    where the model has an operator that float64 lacks. The model must not be cut at each step.
    """
    first, *others = precisions(model)
    yield expect(model, graph, removed, first, run)
    for wide in others:
        try:
            expectation = expect(model, graph, removed, wide, run)
        except Exception:
            return
        yield expectation


def precisions(model: nn.Module) -> tuple[torch.dtype, ...]:
    """The types that a model is checked in, one after another, until it passes."""
    loaded = _loaded(model)
    if loaded and {t.dtype for t in loaded if t.is_floating_point()} == {torch.float64}:
        return (torch.float64,)
    has_double = loaded and loaded[0].device.type != "mps"
    return (torch.float32, torch.float64) if has_double else (torch.float32,)


def catch_fault(action: Check) -> Fault | None:
    """Return what a check returns; any error of it is a fault too, but for lack of memory."""
    try:
        return action()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        return Fault(text=f"the cut model doesn't run: {reason}", runs=False)


def compare_outputs(
    expected: Sequence[Tensor], outputs: Sequence[Tensor], tolerance: float | None
) -> Fault | None:
    """Compare the outputs of the cut model with the expected ones, tensor by tensor.

    Args:
        expected: output tensors of the masked model.
        outputs: as many of the cut model.
        tolerance: the largest difference, as a share of the largest number; None: only the shapes
            must agree, and no number be NaN or infinite.
    """
    if fault := compare_shapes(expected, outputs):
        return fault
    for masked_output, output in zip(expected, outputs, strict=True):
        if tolerance is None:
            if not torch.isfinite(output).all():
                return Fault(text="the cut model's outputs hold NaN or infinity")
        elif (by := _describe(masked_output, output, tolerance)) is not None:
            return Fault(text=f"the cut model's outputs differ from the masked model's{by}")
    return None


def compare_shapes(expected: Sequence[Tensor], outputs: Sequence[Tensor]) -> Fault | None:
    """Compare the shapes of a cut model's outputs with those of the uncut model's."""
    for uncut, output in zip(expected, outputs, strict=True):
        if uncut.shape != output.shape:
            shapes = f"{tuple(output.shape)}, expected {tuple(uncut.shape)}"
            return Fault(text=f"the cut model's output has shape {shapes}")
    return None


def _describe(expected: Tensor, output: Tensor, tolerance: float) -> str | None:
    """By how much two tensors of one shape differ, in words; None where they agree."""
    if not expected.is_floating_point():
        return None if torch.equal(expected, output) else ""
    if not expected.numel():
        return None
    error = differ(expected, output, expected.abs().amax(), 0.0, tolerance)
    return None if error is None else f" by {error:.2g} of their size"


@contextmanager
def _computing(model: nn.Module, wide: torch.dtype) -> Iterator[None]:
    """Let a model compute in a type; nothing is done where it does so anyway."""
    if not _computes_otherwise(model, wide):
        yield
        return
    with computed_in_any_type(model), computing_in(wide, _loaded(model)[0].device):
        yield


def _computes_otherwise(model: nn.Module, wide: torch.dtype) -> bool:
    """Whether a model computes in another type by itself than when it is checked."""
    return wide is not torch.float32 or has_narrow([*_loaded(model), *model.buffers()], wide)


def _loaded(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not on meta; of a streamed model those of the layer in turn."""
    return [parameter for parameter in model.parameters() if not parameter.is_meta]


def _is_exact(graph: CouplingGraph, removed: Mapping[str, list[int]]) -> bool:
    return all(graph[name].exact for name in removed)
