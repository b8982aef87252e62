"""Probes: the places inside a model where the cut model is compared with the masked model.

Every layer, and every module that reads units which go (a consumer), is a probe. The masked model
runs once, and what goes into its probes and comes out of them is recorded. Then the cut model runs,
and each of its layers is fed what the masked model's layer was fed: so no rounding error grows from
layer to layer, and a difference lies where it is seen. A consumer is judged by the size of its own
inputs and outputs, a layer's output by what the layer adds to the hidden states, and each feature
by itself: so no part of the model is too quiet to be seen beside another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunekit.graph import CouplingGraph
from prunekit.graph.groups import ParameterDim
from prunekit.model.stack import hidden_of_call, hidden_of_output, layers_in, module_lists
from prunekit.runtime.precision import has_narrow, widen
from prunekit.surgery.layers import leave_out_dropped

Side = Literal["input", "output"]
_ROWS = 256  # so many positions of a consumer's inputs and outputs are compared
_ROUNDINGS = 32  # so many roundings of the largest number of a position are no difference


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A module of the uncut model whose inputs and outputs are compared.

    Args:
        path: its path, for messages.
        module: the module; it stays the same object when its weights are cut.
        dims: for a linear consumer, (parameter, dim) of its inputs and of its outputs; empty for a
            layer, and for a module with consumers of another form (stacked experts).
        is_layer: whether it is a layer, which is fed what the masked model's was.
        experts: how many experts a module of stacked ones has.
    """

    path: str
    module: nn.Module
    dims: Mapping[Side, ParameterDim] = field(default_factory=dict)
    is_layer: bool = False
    experts: int = 0


class Mismatch(Exception):  # noqa: N818  it ends the forward pass in which it is found
    """A difference at a probe: `path` names the module, `text` says what differs."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(text)
        self.path, self.text = path, text


def find_probes(
    model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]
) -> list[Probe]:
    """The layers that stay, and the modules of the consumers of the units that are removed.

    Args:
        model: the model, not cut yet.
        graph: its graph.
        removed: name of a group → unit indices.
    """
    dropped = {stack.module: removed.get(stack.name, ()) for stack in graph.stacks}
    probes = [
        Probe(path=f"{path}.{index}", module=layer, is_layer=True)
        for path, layers in module_lists(model).items()
        for index, layer in layers_in(layers).items()
        if index not in dropped.get(path, ())
    ]
    gone = tuple(f"{path}.{index}." for path, units in dropped.items() for index in units)
    dims = {
        (member.parameter, member.dim)
        for name in leave_out_dropped(graph, removed)
        for member in graph[name].consumers
        if not member.parameter.startswith(gone) and not member.elsewhere
    }
    probed = {probe.path for probe in probes}
    for parameter, dim in sorted(dims):
        path, _, attribute = parameter.rpartition(".")
        own: dict[Side, ParameterDim] = {}
        if attribute == "weight" and len(graph.shapes[parameter]) == 2:
            own = {"input": (parameter, dim), "output": (parameter, 1 - dim)}
        elif attribute == "weight" or path in probed:  # a convolution, or known already
            continue
        probed.add(path)
        module, shape = model.get_submodule(path), graph.shapes[parameter]
        experts = shape[0] if len(shape) == 3 else 0
        probes.append(Probe(path=path, module=module, dims=own, experts=experts))
    return probes


class Remainder:
    """The positions that stay of every dim that is cut.

    Args:
        graph: the graph of the uncut model.
        removed: name of a group → unit indices.
    """

    def __init__(self, graph: CouplingGraph, removed: Mapping[str, list[int]]) -> None:
        gone: dict[ParameterDim, list[Tensor]] = defaultdict(list)
        for name in leave_out_dropped(graph, removed):
            for member in graph[name].members:
                positions = member.index[removed[name]].flatten()
                gone[member.parameter, member.dim].append(positions)
        self._kept: dict[ParameterDim, tuple[int, Tensor]] = {}  # → (old size, positions)
        for (parameter, dim), parts in gone.items():
            stays = torch.ones(graph.shapes[parameter][dim], dtype=torch.bool)
            stays[torch.cat(parts)] = False
            self._kept[parameter, dim] = len(stays), stays.nonzero().flatten()

    def select(
        self, tensor: Tensor, shape: Sequence[int], own: ParameterDim | None
    ) -> Tensor | None:
        """What stays of a tensor of the uncut model, or None where that can't be told.

        Args:
            tensor: computed by the masked model.
            shape: the shape that it must have in the cut model.
            own: the dim of a parameter that the tensor's last dim belongs to. None: any dim that is
                cut, if all that have this size before and after keep the same positions.
        """
        if tensor.ndim != len(shape):
            return None
        for dim, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
            if old != new:
                fitting = [
                    kept
                    for cut, (size, kept) in self._kept.items()
                    if (size, len(kept)) == (old, new) and own in (None, cut)
                ]
                if not fitting or not all(torch.equal(fitting[0], other) for other in fitting[1:]):
                    return None
                tensor = tensor.index_select(dim, fitting[0].to(tensor.device))
        return tensor


@dataclass(eq=False)
class Recording:
    """What went into the probes of the masked model and came out of them, call by call, in host
    memory; and which dims of consumers the cut model was compared in.

    Args:
        probes: the probes.
        remainder: the positions that stay.
        wide: the type to compute in.
        tolerance: the largest difference that is none, as a share of the largest number.
    """

    probes: Sequence[Probe]
    remainder: Remainder
    wide: torch.dtype
    tolerance: float
    seen: set[ParameterDim] = field(default_factory=set)
    _calls: dict[tuple[Probe, Side], list[Tensor | None]] = field(
        default_factory=lambda: defaultdict(list)
    )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record in a `with` block, in which the masked model runs."""

        def note(probe: Probe, side: Side, tensor: Tensor | None) -> None:
            if tensor is not None:
                tensor = _rows(tensor) if probe.dims else tensor
                tensor = tensor.detach().to("cpu", copy=True)
            self._calls[probe, side].append(tensor)

        with self._watching(note):
            yield

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Compare in a `with` block, in which the cut model runs; its layers are fed what the
        masked model's were.

        Raises:
            Mismatch: at the first difference, out of the forward pass.
        """
        self.seen.clear()
        pending = {key: iter(tensors) for key, tensors in self._calls.items()}
        fed: dict[Probe, Tensor] = {}  # layer → its input

        def compare(probe: Probe, side: Side, tensor: Tensor | None) -> Tensor | None:
            recorded = next(pending[probe, side], None) if (probe, side) in pending else None
            if tensor is None or recorded is None:
                return None
            actual = _rows(tensor) if probe.dims else tensor
            expected = self.remainder.select(recorded, actual.shape, probe.dims.get(side))
            if expected is None:
                return None
            expected = expected.to(actual.device)
            before = fed.pop(probe, None) if side == "output" else None
            self._judge(probe, side, expected, actual, before)
            if side in probe.dims and recorded.shape != actual.shape:
                self.seen.add(probe.dims[side])
            if side == "output" or not probe.is_layer:
                return None
            fed[probe] = expected
            return expected

        with self._watching(compare):
            yield

    def _judge(
        self, probe: Probe, side: Side, expected: Tensor, actual: Tensor, before: Tensor | None
    ) -> None:
        """Raise Mismatch where two tensors differ.

        Args:
            probe: where.
            side: what of it.
            expected: of the masked model.
            actual: of the cut model.
            before: the layer's input, where `expected` is its output.
        """
        added, largest = expected, _size(expected, -1)
        if before is not None and before.shape == expected.shape:
            added, largest = expected - before, torch.maximum(largest, _size(before, -1))
        scale = _size(added, tuple(range(added.ndim - 1)))  # of each feature, over all positions
        slack = largest * _ROUNDINGS * torch.finfo(self.wide).eps
        if (error := differ(expected, actual, scale, slack, self.tolerance)) is not None:
            text = f"the {side} of {probe.path} differs from the masked model's by {error:.2g}"
            raise Mismatch(probe.path, f"{text} of its size")

    @contextmanager
    def _watching(
        self, see: Callable[[Probe, Side, Tensor | None], Tensor | None]
    ) -> Iterator[None]:
        """Show every input and output of the probes to `see`; a tensor that it returns for a
        layer's input takes the place of this input.
        """
        with ExitStack() as hooks:
            for probe in self.probes:

                def before(_: nn.Module, args: Any, kwargs: Any, probe: Probe = probe) -> Any:
                    if has_narrow((args, kwargs), self.wide):  # a layer that runs by itself
                        args, kwargs = widen((args, kwargs), self.wide)
                    hidden = hidden_of_call(args, kwargs)
                    new = see(probe, "input", _floating(hidden))
                    return (args, kwargs) if new is None else _replace(args, kwargs, hidden, new)

                def after(
                    module: nn.Module, args: Any, kwargs: Any, output: Any, probe: Probe = probe
                ) -> None:
                    see(probe, "output", _floating(hidden_of_output(output)))
                    for call in _calls_of_all(probe.experts, args, kwargs):
                        output = module.forward(*call[0], **call[1])  # past the hooks
                        see(probe, "output", _floating(hidden_of_output(output)))

                module = probe.module
                for handle in (
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(after, with_kwargs=True),
                ):
                    hooks.callback(handle.remove)
            yield


def differ(
    expected: Tensor, actual: Tensor, scale: Tensor, slack: Tensor | float, tolerance: float
) -> float | None:
    """By how much two tensors of one shape differ, as a share of `scale`; None: by nothing.

    Args:
        expected: a floating-point tensor.
        actual: the other one.
        scale: the sizes that differences are judged by; it is broadcast.
        slack: differences up to these numbers are none, whatever the scale; it is broadcast.
        tolerance: the largest share of the scale that is no difference.
    """
    error = (expected - actual).abs()
    # Infinity less infinity is no number.
    error = error.masked_fill(expected == actual, 0)
    error = error.masked_fill(expected.isnan() & actual.isnan(), 0)
    is_small = error <= tolerance * scale + slack
    if is_small.all():
        return None
    return (error / scale.clamp_min(1e-30)).masked_fill(is_small, 0).amax().item()


def _size(tensor: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The largest finite number over some dims, which stay as dims of size one."""
    tensor = tensor.masked_fill(~tensor.isfinite(), 0).abs()
    return tensor.amax(dims, keepdim=True) if dims != () else tensor


def _floating(tensor: Tensor | None) -> Tensor | None:
    """A floating-point tensor with numbers in it; None in place of anything else."""
    is_floating = tensor is not None and tensor.is_floating_point() and tensor.numel()
    return tensor if is_floating else None


def _rows(tensor: Tensor) -> Tensor:
    """Some positions of a tensor [..., n], spread evenly: [rows, n]."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows[:: -(-len(rows) // _ROWS)]


def _calls_of_all(
    experts: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls of a module of stacked experts that send its tokens to all of them, in turn.

    There are none where no tensor of integers [tokens, n] tells the module which experts a token
    goes to. Experts that no token of the example reaches are only counted then.

    Args:
        experts: how many there are.
        args: of the call that the model made.
        kwargs: of the same call.
    """
    hidden = hidden_of_call(args, kwargs)
    chosen = next((v for v in (*args, *kwargs.values()) if _is_choice(v, hidden)), None)
    if chosen is None:
        return
    for first in range(0, experts, chosen.numel()):
        turn = torch.arange(first, first + chosen.numel(), device=chosen.device) % experts
        yield _replace(args, kwargs, chosen, turn.view_as(chosen).to(chosen.dtype))


def _is_choice(value: Any, hidden: Tensor | None) -> bool:
    """Whether a value may say which experts each row of the hidden states [..., size] goes to."""
    if not isinstance(value, Tensor) or hidden is None or value.ndim != 2:
        return False
    is_whole = value.dtype in (torch.int32, torch.int64)
    return is_whole and len(value) * hidden.shape[-1] == hidden.numel()


def _replace(args: Any, kwargs: Any, old: Tensor | None, new: Tensor) -> tuple[Any, Any]:
    """Arguments of a call with a copy of one tensor in place of another."""
    new = new.clone()
    return (
        tuple(new if value is old else value for value in args),
        {name: new if value is old else value for name, value in kwargs.items()},
    )
