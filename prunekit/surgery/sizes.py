"""The sizes that a cut changes, as modules and configs count them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunekit.graph import CouplingGraph, Group, Member
from prunekit.model.attributes import Sizes
from prunekit.model.modeling_prunekit import layer_of
from prunekit.model.per_layer import single_kv_head

HEADS = ("attention", "query_head")


@dataclass(frozen=True, kw_only=True, eq=False)
class CutSizes:
    """The sizes that a cut of units changes, before any attribute or config follows.

    Args:
        model: the model, whose weights may be cut already.
        graph: the graph of the uncut model.
        removed: name of a group → the units that go.
        by_group: name of a group → quantity that it decides → (old size, new size).
        by_module: path of a module → quantity that the tracer noted there → (old size, new size).
    """

    model: nn.Module
    graph: CouplingGraph
    removed: Mapping[str, list[int]]
    by_group: Mapping[str, Sizes]
    by_module: Mapping[str, Sizes]

    def modules_around(self, group: Group) -> list[nn.Module]:
        """The modules that may keep a size of the group.

        They own its members, lie around these owners, or lie beside them in the module around. For
        a group inside a layer, only modules inside the same layer count.
        """
        owners = sorted({outer_path(member.parameter) for member in group.members})
        paths = [path for owner in owners for path in (owner, *outer_paths(owner))]
        if group.layer is not None:
            paths = [path for path in paths if layer_of(self.model, path) == group.layer]
        modules = [self.model.get_submodule(path) for path in dict.fromkeys(paths)]
        if group.kind != "channel":  # nearly every module is beside a channel of the whole model
            for path in sorted({outer_path(owner) for owner in owners}):
                modules.extend(self.model.get_submodule(path).modules())
        return list(dict.fromkeys(modules))


def measure_cut(
    model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]], config: Any
) -> CutSizes:
    """Tell what a cut of these units changes; `config` is the model's, or None."""
    groups = [graph[name] for name in removed]
    return CutSizes(
        model=model,
        graph=graph,
        removed=removed,
        by_group={group.name: _group_sizes(graph, group, removed, config) for group in groups},
        by_module=_noted_sizes(graph, removed),
    )


def outer_path(path: str) -> str:
    """The path of the module around a module or a parameter."""
    return path.rpartition(".")[0]


def outer_paths(path: str) -> list[str]:
    """The paths of the modules around a module, the nearest first, the model's own "" last."""
    paths = []
    while path:
        path = outer_path(path)
        paths.append(path)
    return paths


def _group_sizes(
    graph: CouplingGraph, group: Group, removed: Mapping[str, list[int]], config: Any
) -> Sizes:
    """The quantities that a group decides: name of the quantity → (old, new)."""
    units = _units(group, removed)
    if group.kind == "mlp":
        return {"intermediate_size": units}
    if group.kind == "channel":
        return {"hidden_size": units}
    if group.kind == "expert":
        return {"num_experts": width_of(graph, group.members[0], removed)}
    if group.kind == "latent":
        return {_latent_rank(graph, group): units}
    if group.kind == "head_dim" and group.consumers:
        return {"attention_width": _attention_width(graph, group, removed)}
    if group.kind in HEADS:
        return _head_sizes(graph, group, removed, config)
    return {}


def _head_sizes(
    graph: CouplingGraph, group: Group, removed: Mapping[str, list[int]], config: Any
) -> Sizes:
    """Key-value heads, the query heads of each, and their product: the query heads."""
    here = {g.kind: g for g in graph.groups if g.module == group.module and g.kind in HEADS}
    heads = _units(here["attention"], removed) if "attention" in here else (1, 1)
    repeats = _units(here["query_head"], removed) if "query_head" in here else (1, 1)
    sizes = {
        "num_attention_heads": (heads[0] * repeats[0], heads[1] * repeats[1]),
        "attention_width": _attention_width(graph, group, removed),
    }
    if single_kv_head(config, group.layer, heads[0]):  # the units are query heads of the only one
        return {**sizes, "num_key_value_groups": heads}
    return {**sizes, "num_key_value_heads": heads, "num_key_value_groups": repeats}


def _latent_rank(graph: CouplingGraph, group: Group) -> str:
    """The usual name of a latent's rank: that of keys and values, if values are made of it."""
    makes = {member.parameter for member in group.consumers}
    values = (
        member.parameter
        for other in graph.groups
        if other.kind == "head_dim" and other.consumers
        for member in other.members
    )
    return "q_lora_rank" if makes.isdisjoint(values) else "kv_lora_rank"


def _units(group: Group, removed: Mapping[str, list[int]]) -> tuple[int, int]:
    return group.num_units, group.num_units - len(removed.get(group.name, ()))


def _attention_width(
    graph: CouplingGraph, group: Group, removed: Mapping[str, list[int]]
) -> tuple[int, int]:
    """The width of all heads together, which the output projection reads: (old, new)."""
    return width_of(graph, (group.consumers or group.members)[0], removed)


def width_of(
    graph: CouplingGraph, place: Member, removed: Mapping[str, list[int]]
) -> tuple[int, int]:
    """The size of the dim of a parameter in which a member lies: (old, new)."""
    size = graph.shapes[place.parameter][place.dim]
    gone = [
        member.index[units].flatten()
        for name, units in removed.items()
        for member in graph[name].members
        if (member.parameter, member.dim) == (place.parameter, place.dim) and units
    ]
    return size, size - (len(torch.cat(gone).unique()) if gone else 0)


def _noted_sizes(graph: CouplingGraph, removed: Mapping[str, list[int]]) -> dict[str, Sizes]:
    """Path of a module → the sizes that the tracer noted there and this cut changes."""
    sizes: dict[str, Sizes] = defaultdict(dict)
    for extent in graph.extents:
        if extent.quantity and (after := extent.after(removed)) != extent.size:
            sizes[extent.module][extent.quantity] = (extent.size, after)
        if extent.quantity == "qk_head_dim":
            # A rotary position turns two positions of the head, which are one unit.
            pairs = {name: index for name, index in extent.owned.items() if index.shape[1] == 2}
            rotary = sum(index.numel() for index in pairs.values())
            gone = sum(2 * len(removed.get(name, ())) for name in pairs)
            if gone:
                sizes[extent.module]["rotary_dim"] = (rotary, rotary - gone)
    for noted in sizes.values():
        # One number serves queries, keys and values.
        if "qk_head_dim" in noted and noted["qk_head_dim"] == noted.get("v_head_dim"):
            noted["head_dim"] = noted["qk_head_dim"]
    return dict(sizes)
