"""Cut a model by a plan: slice parameters, bring attributes and config in line, check, or undo
everything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import SurgeryError
from prunekit.graph import CouplingGraph, Group
from prunekit.model.attributes import Sizes, fit_to_weight, resize
from prunekit.model.modeling_prunekit import layer_of, per_layer_overrides
from prunekit.model.per_layer import (
    config_values,
    keep_dense,
    keep_head_dim,
    set_per_layer,
    single_kv_head,
)
from prunekit.model.ties import Place, tensor_places
from prunekit.plan import PruningPlan
from prunekit.surgery.layers import drop, surviving


def cut_layer(
    model: nn.Module,
    graph: CouplingGraph,
    removed: Mapping[str, list[int]],
    by_value: str | None = None,
) -> Callable[[], None]:
    """Remove units of one layer's groups, in place, as `apply_plan` does, but without running the
    model.

    The layer's weights may be loaded or on meta, the other layers' likewise. Layers share no unit:
    cut one after another they leave what one plan for all of them leaves. Comparing the layer's
    outputs before and after is up to the caller.

    Args:
        model: what the graph was traced from; this layer not cut yet.
        graph: of the whole dense model.
        removed: group name → unit indices, each once; all groups of one layer.
        by_value: also change attributes of this name ("*": any) that hold a size this cut changes.

    Returns:
        Undoes the cut, and holds the uncut weights for that: let go of it once the outputs are
            checked.

    Raises:
        TraceError: the units don't fit the graph.
        SurgeryError: a group lies in no layer or another one, or is shared with one; on any error
            the model is as it was.
    """
    plan = PruningPlan(removed)
    plan.check(graph)
    layers = {name: graph[name].layer for name in plan.removed}
    if len(set(layers.values())) > 1 or None in layers.values():
        found = ", ".join(f"{name} (layer {layer})" for name, layer in layers.items())
        raise SurgeryError(f"expected groups of one layer, got {found}")
    for name, layer in layers.items():
        for member in graph[name].members:
            for alias in graph.aliases.get(member.parameter, (member.parameter,)):
                if layer_of(model, alias) != layer:
                    raise SurgeryError(
                        f"{name}: expected all of it in layer {layer}, {alias} is not"
                    )
    surgery = _Surgery(model, graph, by_value)
    try:
        surgery.cut(plan.removed)
    except BaseException:
        surgery.undo()
        raise
    return surgery.undo


@dataclass
class _Surgery:
    """One cut and the way back; `by_value`: also change attributes of this name ("*": any) that
    hold an old size.
    """

    model: nn.Module
    graph: CouplingGraph
    by_value: str | None = None
    undone: list[Any] = field(default_factory=list)
    guessed: list[tuple[Any, str, int, int]] = field(default_factory=list)

    def undo(self) -> None:
        while self.undone:
            self.undone.pop()()

    def cut(self, removed: Mapping[str, list[int]]) -> None:
        if left := surviving(self.graph, removed):
            self._cut_units(left)
        for stack in self.graph.stacks:
            if stack.name in removed:
                drop(self.model, stack, removed[stack.name], self._set, self._remember_configs)

    def _cut_units(self, removed: Mapping[str, list[int]]) -> None:
        gone: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        for name, units in removed.items():
            for member in self.graph[name].members:
                gone[member.parameter][member.dim].append(member.index[units].flatten())
        owners = tensor_places(self.model)
        for name, dims in gone.items():
            self._slice(
                owners[name], {dim: torch.cat(positions) for dim, positions in dims.items()}
            )
        for module in self.model.modules():  # wrappers that repeat the sizes of what they wrap
            if "in_features" in module.__dict__:
                fit_to_weight(module, self._set)
        self._configure(removed)

    def _slice(self, places: list[Place], dims: dict[int, Tensor]) -> None:
        module, attribute, _ = places[0]
        old = getattr(module, attribute)
        kept = [
            (dim, _kept(old.shape[dim], positions).to(old.device))
            for dim, positions in dims.items()
        ]
        new = _select(old.detach(), kept)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            if old.grad is not None:
                new.grad = _select(old.grad, kept)
        for module, attribute, _ in places:
            self._set(module, attribute, new)
            self._persist(module, attribute)
            fit_to_weight(module, self._set)

    def _persist(self, module: nn.Module, attribute: str) -> None:
        """A cut buffer belongs to the state: its module would make it anew in the old size."""
        if attribute in module._non_persistent_buffers_set:
            self.undone.append(lambda: module._non_persistent_buffers_set.add(attribute))
            module._non_persistent_buffers_set.discard(attribute)

    def _set(self, target: Any, name: str, value: Any) -> None:
        before = getattr(target, name)
        self.undone.append(lambda: setattr(target, name, before))
        setattr(target, name, value)

    def _configure(self, removed: Mapping[str, list[int]]) -> None:
        config = getattr(self.model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            config = None  # it counts one stack of layers only
        layers: dict[int, list[Sizes]] = defaultdict(list)
        for name in removed:
            group = self.graph[name]
            sizes = group_sizes(self.graph, group, removed, config)
            resize(self._around(group), sizes, self._set)
            if group.layer is not None:
                layers[group.layer].append(sizes)
            elif config is not None:
                if "hidden_size" in sizes:
                    self._remember_configs(config)
                    keep_head_dim(config)
                    keep_dense(config, "hidden_size")
                resize([config], sizes, self._set)
        for path, sizes in self._extents(removed).items():
            module = self.model.get_submodule(path)
            resize(
                [module, *(self.model.get_submodule(outer) for outer in _outer_paths(path))],
                sizes,
                self._set,
            )
            if "head_dim" in sizes and (layer := layer_of(self.model, path)) is not None:
                layers[layer].append({"head_dim": sizes["head_dim"]})
        if self.by_value:
            self._resize_by_value(removed)
        counted = isinstance(getattr(config, "num_hidden_layers", None), int)
        if config is not None and layers and counted and hasattr(config, "per_layer_config"):
            self._remember_configs(config)
            overrides = per_layer_overrides(config)
            for layer, changes in layers.items():
                own = overrides.setdefault(layer, {})
                for values in [config_values(config, own, sizes) for sizes in changes]:
                    own.update(values)
            set_per_layer(self.model, overrides, self._set)

    def _around(self, group: Group) -> list[nn.Module]:
        """The modules that may read a group's size: its members' modules, those around them and
        those beside them.
        """
        owners = {_outer(member.parameter) for member in group.members}
        paths = [path for owner in sorted(owners) for path in (owner, *_outer_paths(owner))]
        if group.layer is not None:
            paths = [path for path in paths if layer_of(self.model, path) == group.layer]
        modules = map(self.model.get_submodule, dict.fromkeys(paths))
        beside = {_outer(owner) for owner in owners} if group.kind != "channel" else ()
        inside = (
            module for path in sorted(beside) for module in self.model.get_submodule(path).modules()
        )
        return list(dict.fromkeys([*modules, *inside]))

    def _extents(self, removed: Mapping[str, list[int]]) -> dict[str, Sizes]:
        """Module path → the sizes noted there that this cut changes; `head_dim` where one number
        serves q, k and v.
        """
        found: dict[str, Sizes] = defaultdict(dict)
        for extent in self.graph.extents:
            if (after := extent.after(removed)) != extent.size:
                found[extent.module][extent.quantity] = (extent.size, after)
            if extent.quantity == "qk_head_dim":
                pairs = {name: index for name, index in extent.owned.items() if index.shape[1] == 2}
                rotary = sum(index.numel() for index in pairs.values())
                gone = sum(2 * len(removed.get(name, ())) for name in pairs)
                found[extent.module] |= {"rotary_dim": (rotary, rotary - gone)} if gone else {}
        for sizes in found.values():
            if "qk_head_dim" in sizes and sizes["qk_head_dim"] == sizes.get("v_head_dim"):
                sizes["head_dim"] = sizes["qk_head_dim"]
        return found

    def _resize_by_value(self, removed: Mapping[str, list[int]]) -> None:
        """Attributes of any name that hold a size this cut changes, in the modules around the
        group.
        """
        for name in removed:
            group = self.graph[name]
            values: dict[int, set[int]] = defaultdict(set)
            values[group.num_units].add(group.num_units - len(removed[name]))
            for member in group.members:
                size = self.graph.shapes[member.parameter][member.dim]
                values[size].add(size - member.index[removed[name]].numel())
            for extent in self.graph.extents:
                if name in extent.owned:
                    values[extent.size].add(extent.after(removed))
            for module in self._around(group):
                for attribute, value in list(module.__dict__.items()):
                    wanted = self.by_value in ("*", attribute) and type(value) is int
                    if wanted and len(values.get(value, ())) == 1:
                        (new,) = values[value]
                        self._set(module, attribute, new)
                        self.guessed.append((module, attribute, value, new))

    def _remember_configs(self, config: Any) -> None:
        state = dict(config.__dict__)
        holders = [(m, m.config) for m in self.model.modules() if "config" in m.__dict__]

        def restore() -> None:
            config.__dict__.clear()
            config.__dict__.update(state)
            for module, own in holders:
                module.config = own

        self.undone.append(restore)


def _outer(path: str) -> str:
    return path.rpartition(".")[0]


def _outer_paths(path: str) -> list[str]:
    """The paths of the modules around a module, the nearest first."""
    paths = []
    while path:
        path = _outer(path)
        paths.append(path)
    return paths


def _select(tensor: Tensor, kept: list[tuple[int, Tensor]]) -> Tensor:
    for dim, positions in kept:
        tensor = tensor.index_select(dim, positions)
    return tensor.contiguous()


def _kept(size: int, removed: Tensor) -> Tensor:
    keep = torch.ones(size, dtype=torch.bool)
    keep[removed] = False
    return keep.nonzero().flatten()


def group_sizes(
    graph: CouplingGraph, group: Group, removed: Mapping[str, list[int]], config: Any
) -> Sizes:
    """The sizes a cut of this group changes: quantity → (old, new)."""

    def both(which: Group | None) -> tuple[int, int]:
        return (
            (which.num_units, which.num_units - len(removed.get(which.name, ())))
            if which
            else (1, 1)
        )

    old, new = both(group)
    if group.kind == "mlp":
        return {"intermediate_size": (old, new)}
    if group.kind == "channel":
        return {"hidden_size": (old, new)}
    if group.kind == "expert":
        return {"num_experts": (old, new)}
    if group.kind == "head_dim" and group.consumers:
        return {"attention_width": _attention_width(graph, group, removed)}
    if group.kind not in ("attention", "query_head"):
        return {}
    here = {
        g.kind: g
        for g in graph.groups
        if g.module == group.module and g.kind in ("attention", "query_head")
    }
    units, repeats = both(here.get("attention")), both(here.get("query_head"))
    heads = (units[0] * repeats[0], units[1] * repeats[1])
    sizes = {
        "num_attention_heads": heads,
        "attention_width": _attention_width(graph, group, removed),
    }
    if single_kv_head(config, group.layer, units[0]):
        return {**sizes, "num_key_value_groups": units}
    return {**sizes, "num_key_value_heads": units, "num_key_value_groups": repeats}


def _attention_width(
    graph: CouplingGraph, group: Group, removed: Mapping[str, list[int]]
) -> tuple[int, int]:
    """Width of what all heads hold together: of the axis the output projection reads."""
    member = group.consumers[0] if group.consumers else group.members[0]
    size = graph.shapes[member.parameter][member.dim]
    gone = [
        other.index[removed[name]].flatten()
        for name in removed
        for other in graph[name].members
        if (other.parameter, other.dim) == (member.parameter, member.dim) and removed[name]
    ]
    return size, size - (len(torch.cat(gone).unique()) if gone else 0)
