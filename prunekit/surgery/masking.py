"""The masked model, the reference of every cut: slices zeroed, whole layers passed over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunekit.graph import CouplingGraph, Group, Member
from prunekit.runtime.modes import at_rest
from prunekit.surgery.layers import passing_over

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, torch.dropout)
_OF_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _WithoutDropout(TorchFunctionMode):
    """Drops nothing out: of fewer units, another part would go."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs = {**kwargs, **dict(zip(_OF_ATTENTION, args, strict=False)), "dropout_p": 0.0}
            args = ()
        return func(*args, **kwargs)


@contextmanager
def _drawing_alike() -> Iterator[None]:
    """Let every pass draw the same random numbers; the generators are as before afterwards."""
    on_gpu = torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if on_gpu else ()
    with torch.random.fork_rng(devices=devices), _WithoutDropout():
        torch.default_generator.manual_seed(0)
        if on_gpu:
            torch.cuda.manual_seed_all(0)
        yield


def run_example(model: nn.Module, graph: CouplingGraph) -> list[Tensor]:
    """Run the model on the graph's example inputs, in evaluation mode; all its output tensors.

    A model that draws random numbers in evaluation mode, too, draws the same ones each time.
    """
    return run_inputs(model, graph.example_inputs)


@torch.no_grad()
def run_inputs(
    model: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...]
) -> list[Tensor]:
    """Run the model on inputs, keyword or positional, as `run_example` does."""
    device = next(model.parameters()).device
    inputs = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(device, copy=True), example_inputs
    )
    with at_rest(model), _drawing_alike():
        outputs = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    leaves = torch.utils._pytree.tree_leaves(
        dict(outputs) if isinstance(outputs, Mapping) else outputs
    )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@contextmanager
def masked(
    model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]
) -> Iterator[None]:
    """Mask units inside a `with` block: zero their slices, and pass whole layers over.

    The slices of consumers are zeroed, so that nothing reads the units. Where no weight reads a
    unit, because activations are contracted with activations, all its slices are zeroed.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with ExitStack() as stack:
        for name, units in removed.items():
            for member in members_to_zero(graph[name], graph):
                tensor = tensors[member.parameter].data
                positions = member.index[units].flatten().to(tensor.device)
                slices = tensor.index_select(member.dim, positions)
                stack.callback(tensor.index_copy_, member.dim, positions, slices)
                tensor.index_fill_(member.dim, positions, 0)
        stack.enter_context(passing_over(model, graph, removed))
        yield


def members_to_zero(group: Group, graph: CouplingGraph) -> tuple[Member, ...]:
    """The members whose slices mask a unit."""
    if group.consumers and group.kind != "head_dim":
        return group.consumers
    # Queries meet keys in the width of a head: activations. Buffers there are rotary frequencies.
    return tuple(member for member in group.members if member.parameter not in graph.buffers)
