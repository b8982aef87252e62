"""The masked model, the reference of every cut: slices zeroed, whole layers passed over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from prunekit.graph import CouplingGraph
from prunekit.runtime.modes import at_rest, keep_tensors
from prunekit.surgery.layers import passed_over


@torch.no_grad()
def run_example(model: nn.Module, graph: CouplingGraph) -> list[Tensor]:
    """The model's output tensors on the graph's example inputs, in evaluation mode."""
    device = next(model.parameters()).device
    inputs = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(device, copy=True), graph.example_inputs
    )
    with at_rest(model):
        outputs = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    leaves = torch.utils._pytree.tree_leaves(
        dict(outputs) if isinstance(outputs, Mapping) else outputs
    )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def masked_outputs(
    model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]
) -> list[Tensor]:
    """What the model computes with the units' consumer slices zeroed (producers' where a group has
    no consumer).

    Whole layers return the hidden states they were given.
    """
    with masked(model, graph, removed):
        return run_example(model, graph)


@contextmanager
def masked(
    model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]
) -> Iterator[None]:
    """Zero the slices, and pass whole layers over, for the duration of a `with` block."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with ExitStack() as stack:
        for name, units in removed.items():
            group = graph[name]
            compared = (
                group.kind == "head_dim" or not group.consumers
            )  # by activations, no weight reads them
            for member in group.members if compared else group.consumers:
                if compared and member.parameter in graph.buffers:
                    continue
                tensor = tensors[member.parameter].data
                stack.callback(keep_tensors([tensor]))
                tensor.index_fill_(member.dim, member.index[units].flatten().to(tensor.device), 0)
        stack.enter_context(passed_over(model, graph, removed))
        yield
