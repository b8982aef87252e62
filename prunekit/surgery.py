"""Cut a model by a plan: slice parameters, bring attributes and config in line, check, or undo everything."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import DataError, SurgeryError
from prunekit.graph import CoupledGroup, CouplingGraph
from prunekit.plan import PruningPlan

# Attributes that repeat a dim of the module's own weight: name → dim.
_WEIGHT_DIMS = {
    "out_features": 0, "in_features": 1, "embedding_dim": 1, "num_embeddings": 0, "num_features": 0, "num_channels": 0,
    "nf": 1, "nx": 0,
}  # fmt: skip
# What attributes call the sizes a group decides, in modules and configs; changed only where the old value agrees.
_SYNONYMS = {
    "num_attention_heads": ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_query_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv"),
    "num_key_value_groups": ("num_key_value_groups", "n_rep"),
    "attention_width": ("split_size", "all_head_size"),
    "intermediate_size": (
        "intermediate_size",
        "ffn_dim",
        "ffn_hidden_size",
        "inner_dim",
        "n_inner",
        "d_ff",
        "hidden_dim",
    ),
    "hidden_size": ("hidden_size", "n_embd", "embed_dim", "d_model", "hidden_dim"),
}
Sizes = dict[str, tuple[int, int]]  # what a size is called → (old, new)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def apply_plan(model: nn.Module, graph: CouplingGraph, plan: PruningPlan) -> None:
    """Remove the plan's units from the model, in place.

    Slices parameters, their gradients and buffers (tied ones once), sets the attributes modules read while they run,
    and gives each layer its own view of the config. Then the cut model's outputs on the graph's example inputs must
    equal the uncut model's with the units' consumer columns zeroed; groups the tracer calls inexact are exempt.

    Raises:
        TraceError: the plan doesn't fit the graph.
        DataError: the uncut model's outputs hold NaN or infinity.
        SurgeryError: the outputs differ; the model is as it was, and the message names the group.
    """
    plan.check(graph)
    if not plan.removed:
        return
    if any(p.is_meta for p in model.parameters()):
        _Surgery(model, graph).cut(plan.removed)
        return
    exact = all(graph[name].exact for name in plan.removed)
    expected = masked_outputs(model, graph, plan.removed)
    if not all(torch.isfinite(output).all() for output in expected):
        raise DataError("the model's outputs hold NaN or infinity before anything is cut")
    surgery = _Surgery(model, graph)
    try:
        surgery.cut(plan.removed)
        problem = _difference(expected, run_example(model, graph), exact)
    except BaseException as error:
        surgery.undo()
        if isinstance(error, RuntimeError | ValueError | AttributeError | TypeError):
            raise SurgeryError(f"{_culprit(model, graph, plan)}: the cut model doesn't run: {error}") from error
        raise
    if problem:
        surgery.undo()
        raise SurgeryError(f"{_culprit(model, graph, plan)}: {problem}; the model was put back")


@torch.no_grad()
def run_example(model: nn.Module, graph: CouplingGraph) -> list[Tensor]:
    """The model's output tensors on the graph's example inputs, in evaluation mode."""
    device = next(model.parameters()).device
    inputs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), graph.example_inputs)
    training = model.training
    model.eval()
    try:
        outputs = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    finally:
        model.train(training)
    leaves = torch.utils._pytree.tree_leaves(dict(outputs) if isinstance(outputs, Mapping) else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def masked_outputs(model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]) -> list[Tensor]:
    """What the model computes with the units' consumer slices zeroed (producers' where a group has no consumer)."""
    with masked(model, graph, removed):
        return run_example(model, graph)


@contextmanager
def masked(model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]) -> Iterator[None]:
    """Zero the slices for the duration of a `with` block."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for name, units in removed.items():
            for member in graph[name].consumers or graph[name].members:
                tensor = tensors[member.parameter].data
                saved.append((tensor, tensor.clone()))
                tensor.index_fill_(member.dim, member.index[units].flatten().to(tensor.device), 0)
        yield
    finally:
        for tensor, original in reversed(saved):
            tensor.copy_(original)


def _difference(expected: list[Tensor], got: list[Tensor], exact: bool) -> str | None:
    for before, after in zip(expected, got, strict=True):
        if before.shape != after.shape:
            return f"the cut model's output has shape {tuple(after.shape)}, expected {tuple(before.shape)}"
        if not exact or not before.is_floating_point():
            continue
        scale = before.float().abs().max().clamp_min(1e-30)
        error = ((before.float() - after.float()).abs().max() / scale).item()
        if not error <= _TOLERANCE.get(before.dtype, 1e-3):
            return f"the cut model's outputs differ from the masked model's by {error:.2g} of their size"
    return None


def _culprit(model: nn.Module, graph: CouplingGraph, plan: PruningPlan) -> str:
    """The first group that, cut alone, does not leave the masked model's outputs."""
    for name, units in plan.removed.items():
        surgery = _Surgery(model, graph)
        expected = masked_outputs(model, graph, {name: units})
        try:
            surgery.cut({name: units})
            if _difference(expected, run_example(model, graph), graph[name].exact):
                return name
        except (RuntimeError, ValueError, AttributeError, TypeError):
            return name
        finally:
            surgery.undo()
    return ", ".join(plan.removed)


@dataclass
class _Surgery:
    """One cut and the way back."""

    model: nn.Module
    graph: CouplingGraph
    undone: list[Any] = field(default_factory=list)

    def undo(self) -> None:
        while self.undone:
            self.undone.pop()()

    def cut(self, removed: Mapping[str, list[int]]) -> None:
        gone: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        for name, units in removed.items():
            for member in self.graph[name].members:
                gone[member.parameter][member.dim].append(member.index[units].flatten())
        owners = _owners(self.model)
        for name, dims in gone.items():
            self._slice(owners[name], {dim: torch.cat(positions) for dim, positions in dims.items()})
        self._configure(removed)

    def _slice(self, places: list[tuple[nn.Module, str]], dims: dict[int, Tensor]) -> None:
        module, attribute = places[0]
        old = getattr(module, attribute)
        kept = [(dim, _kept(old.shape[dim], positions).to(old.device)) for dim, positions in dims.items()]
        new = _select(old.detach(), kept)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            if old.grad is not None:
                new.grad = _select(old.grad, kept)
        for module, attribute in places:
            self._set(module, attribute, new)
            fit_to_weight(module, self._set)

    def _set(self, target: Any, name: str, value: Any) -> None:
        before = getattr(target, name)
        self.undone.append(lambda: setattr(target, name, before))
        setattr(target, name, value)

    def _configure(self, removed: Mapping[str, list[int]]) -> None:
        config = getattr(self.model, "config", None)
        layers: dict[int, Sizes] = defaultdict(dict)
        for name in removed:
            group = self.graph[name]
            sizes = group_sizes(self.graph, group, removed, config)
            if group.layer is not None:
                layers[group.layer] |= sizes
            else:
                resize([self.model.get_submodule(group.module)], sizes, self._set)
                for quantity, (old, new) in sizes.items() if config is not None else ():
                    _resize_one(config, quantity, old, new, self._set)
        for layer, sizes in layers.items():
            resize(modules_of_layer(self.model, layer), sizes, self._set)
        if config is not None and layers and hasattr(config, "per_layer_config"):
            self._remember_configs(config)
            overrides = per_layer_overrides(config)
            for layer, sizes in layers.items():
                if "intermediate_size" in sizes and config_name(config, "intermediate_size") is None:
                    config.intermediate_size = sizes["intermediate_size"][0]  # a class that derives it: store it anyway
                named = {config_name(config, quantity): new for quantity, (_, new) in sizes.items()}
                overrides.setdefault(layer, {}).update({k: v for k, v in named.items() if k is not None})
            set_per_layer(self.model, overrides)

    def _remember_configs(self, config: Any) -> None:
        state = dict(config.__dict__)
        holders = [(m, m.config) for m in self.model.modules() if "config" in m.__dict__]

        def restore() -> None:
            config.__dict__.clear()
            config.__dict__.update(state)
            for module, own in holders:
                module.config = own

        self.undone.append(restore)


def modules_of_layer(model: nn.Module, layer: int) -> list[nn.Module]:
    """Every module inside the `layer`-th entry of a `ModuleList`."""
    return [module for path, module in model.named_modules() if layer_of(model, path) == layer]


def resize(modules: Iterable[nn.Module], sizes: Sizes, setter: Callable[[Any, str, Any], None] = setattr) -> None:
    """Bring attributes that repeat a changed size in line, where their value is the old one."""
    for module in modules:
        for quantity, (old, new) in sizes.items():
            _resize_one(module, quantity, old, new, setter)


def _resize_one(target: Any, quantity: str, old: int, new: int, setter: Callable[[Any, str, Any], None]) -> None:
    for name in _SYNONYMS[quantity]:
        if name in target.__dict__ and isinstance(target.__dict__[name], int) and target.__dict__[name] == old:
            setter(target, name, new)


def fit_to_weight(module: nn.Module, setter: Callable[[Any, str, Any], None] = setattr) -> None:
    """Set the attributes of a module that repeat its own weight's shape (`in_features`, `normalized_shape`, …)."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    for name, dim in _WEIGHT_DIMS.items():
        if name in module.__dict__ and dim < weight.ndim:
            setter(module, name, weight.shape[dim])
    if "normalized_shape" in module.__dict__:
        setter(module, "normalized_shape", tuple(weight.shape))


def _select(tensor: Tensor, kept: list[tuple[int, Tensor]]) -> Tensor:
    for dim, positions in kept:
        tensor = tensor.index_select(dim, positions)
    return tensor.contiguous()


def _kept(size: int, removed: Tensor) -> Tensor:
    keep = torch.ones(size, dtype=torch.bool)
    keep[removed] = False
    return keep.nonzero().flatten()


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Canonical tensor name → every (module, attribute) that holds it."""
    names: dict[int, str] = {}
    places: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                name = names.setdefault(id(tensor), f"{prefix}.{attribute}" if prefix else attribute)
                places[name].append((module, attribute))
    return places


def group_sizes(graph: CouplingGraph, group: CoupledGroup, removed: Mapping[str, list[int]], config: Any) -> Sizes:
    """The sizes a cut of this group changes: quantity → (old, new)."""

    def both(which: CoupledGroup | None) -> tuple[int, int]:
        return (which.num_units, which.num_units - len(removed.get(which.name, ()))) if which else (1, 1)

    old, new = both(group)
    if group.kind == "mlp":
        return {"intermediate_size": (old, new)}
    if group.kind == "channel":
        return {"hidden_size": (old, new)}
    if group.kind not in ("attention", "query_head"):
        return {}
    here = {g.kind: g for g in graph.groups if g.module == group.module and g.kind in ("attention", "query_head")}
    units, repeats = both(here.get("attention")), both(here.get("query_head"))
    heads = (units[0] * repeats[0], units[1] * repeats[1])
    sizes = {"num_attention_heads": heads}
    if head_dim := _head_dim(config):
        sizes["attention_width"] = (heads[0] * head_dim, heads[1] * head_dim)
    if _single_kv_head(config, group.layer, units[0]):
        return {**sizes, "num_key_value_groups": units}
    return {**sizes, "num_key_value_heads": units, "num_key_value_groups": repeats}


def layer_sizes(config: Any, values: Mapping[str, int]) -> Sizes:
    """What a layer's own config values (`per_layer_config`) change against the model's: quantity → (old, new)."""
    named = {q: name for q in _SYNONYMS if (name := config_name(config, q)) is not None}
    sizes = {q: (_read(config, name), values[name]) for q, name in named.items() if name in values}
    heads, kv = sizes.get("num_attention_heads"), sizes.get("num_key_value_heads")
    if "num_key_value_heads" in named and (heads or kv):
        heads = heads or (_read(config, "num_attention_heads"),) * 2
        kv = kv or (_read(config, named["num_key_value_heads"]),) * 2
        sizes["num_key_value_groups"] = (heads[0] // kv[0], heads[1] // kv[1])
    if heads and (head_dim := _head_dim(config)):
        sizes["attention_width"] = (heads[0] * head_dim, heads[1] * head_dim)
    return sizes


def _single_kv_head(config: Any, layer: int | None, units: int) -> bool:
    """Whether all query heads of the layer read one key-value head, so that the units are query heads."""
    own = per_layer_overrides(config).get(layer, {}) if layer is not None and hasattr(config, "to_dict") else {}
    values = [own.get(name, _read(config, name)) for name in _SYNONYMS["num_key_value_heads"]]
    return units > 1 and 1 in values


def _read(config: Any, name: str) -> Any:
    """A config attribute's global value, also where transformers calls it ambiguous."""
    reader = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return reader(name, None) if reader else getattr(config, name, None)


def config_name(config: Any, quantity: str) -> str | None:
    """What a config calls a size."""
    names = [name for name in _SYNONYMS[quantity] if _has(config, name)]
    return next((name for name in names if _read(config, name) is not None), names[0] if names else None)


def _has(config: Any, name: str) -> bool:
    reader = getattr(config, "_hasattr_without_heterogeneous_validation", None)
    return reader(name) if reader else hasattr(config, name)


def per_layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """A copy of the config's per-layer values (transformers' `per_layer_config`), as plain dictionaries."""
    stored = config.to_dict().get("per_layer_config") or {}
    return {int(layer): dict(values) for layer, values in stored.items()}


def set_per_layer(model: nn.Module, overrides: dict[int, dict[str, Any]]) -> None:
    """Set the config's per-layer values and let every module inside a layer see its layer's.

    Where all layers agree the values become global ones (unless the config's class refuses them, as it does head counts
    that don't divide the hidden size), and the config is an ordinary one again.
    """
    config: Any = model.config
    if (head_dim := _head_dim(config)) and not isinstance(_read(config, "head_dim"), int):
        config.head_dim = head_dim
    overrides = {layer: dict(values) for layer, values in overrides.items()}
    config.per_layer_config = None
    names = {name for values in overrides.values() for name in values}
    columns = {
        n: {overrides.get(i, {}).get(n, getattr(config, n)) for i in range(config.num_hidden_layers)} for n in names
    }
    agreed = {name: min(column) for name, column in columns.items() if len(column) == 1}
    if agreed.keys() == columns.keys() and _become_global(config, agreed):
        overrides = {}
    config.per_layer_config = {layer: values for layer, values in overrides.items() if values} or None
    for path, module in model.named_modules():
        if "config" in module.__dict__ and (layer := layer_of(model, path)) is not None:
            module.config = LayerConfig(config, overrides.get(layer, {})) if config.is_heterogeneous else config


def _become_global(config: Any, values: Mapping[str, int]) -> bool:
    known = {*getattr(config, "attribute_map", {}), *dir(type(config))}
    if not values.keys() <= known:
        return False
    before = {name: getattr(config, name) for name in values}
    for name, value in values.items():
        setattr(config, name, value)
    try:
        config.validate_architecture()
    except ValueError:
        for name, value in before.items():
            setattr(config, name, value)
        return False
    return True


def _head_dim(config: Any) -> int | None:
    if isinstance(stored := _read(config, "head_dim"), int):
        return stored
    heads, hidden = _read(config, "num_attention_heads"), _read(config, "hidden_size")
    return hidden // heads if heads and hidden and hidden % heads == 0 else None


def layer_of(model: nn.Module, path: str) -> int | None:
    """Index of the layer (the first `ModuleList` entry) the module path lies in, or None."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return int(part)
    return None


class LayerConfig:
    """One layer's view of a model's config: its own sizes, everything else live from the model's."""

    def __init__(self, base: Any, overrides: dict[str, Any]) -> None:
        self.__dict__.update(_base=base, _overrides=dict(overrides))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_base" not in self.__dict__:
            raise AttributeError(name)
        name = getattr(self._base, "attribute_map", {}).get(name, name)
        return self._overrides[name] if name in self._overrides else _live(self._base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._overrides[name] = value


def _live(config: Any, name: str) -> Any:
    reader = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return reader(name) if reader else getattr(config, name)
