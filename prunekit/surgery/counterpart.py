"""The counterpart of a cut model: what the model's own class builds with the smaller numbers.

Units of an inexact group can't be masked, so that nothing tells whether the group holds all that
shares its axis. Where the class can be built with fewer units, it tells.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from prunekit.graph import CouplingGraph, Group
from prunekit.graph.groups import ParameterDim
from prunekit.model.build import adopt, build_dense
from prunekit.model.compat import read
from prunekit.model.modeling_prunekit import (
    as_dense,
    empty_sublayers,
    layer_of,
    per_layer_overrides,
)
from prunekit.model.names import config_name
from prunekit.model.per_layer import keep_head_dim
from prunekit.model.record import stock_class
from prunekit.surgery.check import compare_outputs
from prunekit.surgery.configs import config_to_cut
from prunekit.surgery.fault import Fault
from prunekit.surgery.masking import run_example
from prunekit.surgery.sizes import measure_cut

Removed = Mapping[str, list[int]]
# Quantities that a config states by themselves; a class may derive other sizes from them, which
# belong to other groups then.
_STATED = ("num_experts", "intermediate_size", "hidden_size", "q_lora_rank", "kv_lora_rank")
_TOLERANCE = 1e-3  # of the largest output; rounding in half precision is allowed for


def find_unshared(model: nn.Module, graph: CouplingGraph, removed: Removed) -> Fault | None:
    """Look for a tensor that the class makes smaller with an inexact group, and the cut does not.

    Passes where the class can't be built with the smaller number.
    """
    config = config_to_cut(model)
    if config is None or not hasattr(config, "per_layer_config"):
        return None
    known: dict[object, Mapping[ParameterDim, int]] = {}
    for name, sizes in measure_cut(model, graph, removed, config).by_group.items():
        group = graph[name]
        for quantity in () if group.exact else _STATED:
            if quantity in sizes:
                if group.likeness not in known:
                    known[group.likeness] = _shrinking(model, config, quantity, *sizes[quantity])
                for place in _unshared(model, graph, group, known[group.likeness]):
                    text = f"its class makes dim {place[1]} of {place[0]} smaller with it, the cut"
                    return Fault(text=f"{text} doesn't: the tracer has missed it", group=name)
    return None


def _shrinking(
    model: nn.Module, config: Any, quantity: str, old: int, new: int
) -> dict[ParameterDim, int]:
    """Each dim that is smaller where the class is built with the new number → its dense size."""
    name = config_name(config, quantity)
    if name is None or read(config, name) != old:
        return {}
    try:
        config = copy.deepcopy(config)
        keep_head_dim(config)
        dense = _shapes(model, config)
        setattr(config, name, new)
        smaller = _shapes(model, config)
    except Exception:  # the class refuses the number
        return {}
    return {
        (tensor, dim): size
        for tensor, shape in dense.items()
        if len(smaller.get(tensor, ())) == len(shape)
        for dim, size in enumerate(shape)
        if size - smaller[tensor][dim] == old - new
    }


def _shapes(model: nn.Module, config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that the class makes from a config."""
    with as_dense(config), torch.device("meta"):
        built = stock_class(model)(config)
    tensors = [*built.named_parameters(), *built.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _unshared(
    model: nn.Module, graph: CouplingGraph, group: Group, smaller: Mapping[ParameterDim, int]
) -> Iterator[ParameterDim]:
    """The dims that share the group's number by the class, and belong to no prunable group."""
    owned = {(m.parameter, m.dim) for g in graph.groups if g.prunable for m in g.members}
    idle = tuple(f"{path}." for path in empty_sublayers(model))  # weights that nothing uses
    for (name, dim), size in smaller.items():
        shape = graph.shapes.get(name)
        inside = group.layer is None or layer_of(model, name) == group.layer
        if shape is None or shape[dim] != size or not inside or name.startswith(idle):
            continue
        if (name, dim) not in owned:
            yield name, dim


def compare_with_class(model: nn.Module, graph: CouplingGraph, removed: Removed) -> Fault | None:
    """Compare the outputs of a cut mixture of experts with those of its class, built smaller.

    Both hold the same tensors. Passes where the class can't be built so, where layers differ, and
    where other inexact groups are cut: the class may then compute with another scale on purpose.
    """
    kinds = {graph[name].kind for name in removed if not graph[name].exact}
    config: Any = config_to_cut(model)
    if kinds != {"expert"} or next(model.parameters()).is_meta:
        return None
    if config is None or not hasattr(config, "per_layer_config") or per_layer_overrides(config):
        return None
    try:
        own = copy.deepcopy(config)
        own.architectures = [stock_class(model).__name__]
        twin = build_dense(own, getattr(config, "_attn_implementation", None))
        adopt(twin, model.state_dict(), exact=True)
        twin.eval()
        expected = run_example(twin, graph)
    except Exception:  # its shapes are those of another class, or it needs more than its config
        return None
    if compare_outputs(expected, run_example(model, graph), _TOLERANCE) is None:
        return None
    return Fault(text="the cut model computes other outputs than its class, built smaller")
