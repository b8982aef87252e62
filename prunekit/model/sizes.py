"""What modules and configs call the sizes that groups decide, and each layer's own view of its
model's config.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from prunekit.model.modeling_prunekit import as_dense, give_views, layer_of, per_layer_overrides

# Attributes that repeat a dim of the module's own weight: name → dim.
_WEIGHT_DIMS = {
    "out_features": 0,
    "in_features": 1,
    "embedding_dim": 1,
    "num_embeddings": 0,
    "num_features": 0,
    "nf": 1,
    "nx": 0,
}
# What attributes call a size, in modules and configs; changed only where the old value agrees.
_SYNONYMS = {
    "num_attention_heads": (
        "num_attention_heads",
        "num_heads",
        "n_heads",
        "n_head",
        "num_query_heads",
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv"),
    "num_key_value_groups": ("num_key_value_groups", "n_rep"),
    "attention_width": ("split_size", "all_head_size"),
    "intermediate_size": (
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "ffn_dim",
        "ffn_hidden_size",
        "inner_dim",
        "n_inner",
        "d_ff",
        "intermediate_dim",
        "hidden_dim",
    ),
    "hidden_size": ("hidden_size", "n_embd", "embed_dim", "d_model", "hidden_dim"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "head_dim": (
        "head_dim",
        "head_size",
        "attn_head_size",
        "key_value_proj_dim",
        "d_kv",
        "kv_channels",
    ),
    "rotary_dim": ("rotary_ndims", "rotary_dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
}
# Config values that count the layers of one sort at the beginning of the list.
_FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers")
# Config lists that never hold one entry per layer.
_NO_LAYERS = ("architectures", "eos_token_id", "suppress_tokens", "begin_suppress_tokens")
# Inside attention these mean what all heads hold together.
_WIDTHS = ("embed_dim", "hidden_size", "inner_dim", "d_model", "n_embd")
Sizes = dict[str, tuple[int, int]]  # what a size is called → (old, new)
Setter = Callable[[Any, str, Any], None]


def modules_of_layer(model: nn.Module, layer: int) -> list[nn.Module]:
    """Every module inside the `layer`-th entry of a `ModuleList`."""
    return [module for path, module in model.named_modules() if layer_of(model, path) == layer]


def resize(modules: Iterable[nn.Module], sizes: Sizes, setter: Setter = setattr) -> None:
    """Bring attributes that repeat a changed size in line, where their value is the old one."""
    for module in modules:
        for quantity, (old, new) in sizes.items():
            _resize_one(module, quantity, old, new, setter)


def _resize_one(target: Any, quantity: str, old: int, new: int, setter: Setter) -> None:
    for name in _names(target, quantity):
        value = target.__dict__.get(name)
        if type(value) is int and value == old:
            setter(target, name, new)
        elif isinstance(value, list | tuple) and tuple(value) == (old,):
            setter(target, name, (new,))


def _names(target: Any, quantity: str) -> tuple[str, ...]:
    """What `target` may call a size."""
    names = _SYNONYMS.get(quantity, (quantity,))
    if isinstance(target, nn.Module) and _is_attention(target):
        if quantity == "attention_width":
            return (*names, *_WIDTHS)
        if quantity in ("hidden_size", "intermediate_size"):
            return tuple(name for name in names if name not in _WIDTHS)
    return names


def _is_attention(module: nn.Module) -> bool:
    """Whether a module counts heads and holds no layers that do."""
    counts = any(name in module.__dict__ for name in _SYNONYMS["num_attention_heads"])
    return counts and not any(isinstance(child, nn.ModuleList) for child in module.children())


def fit_to_weight(module: nn.Module, setter: Setter = setattr) -> None:
    """Set the attributes of a module that repeat its weight's shape (`in_features`,
    `normalized_shape`, …).

    The weight may be that of a module it wraps (an adapter's `base_layer`).
    """
    weight = module._parameters.get("weight")
    if weight is None and "in_features" in module.__dict__:
        weight = getattr(module, "weight", None)
    if weight is None:
        return
    for name, dim in _WEIGHT_DIMS.items():
        if name in module.__dict__ and dim < weight.ndim:
            setter(module, name, weight.shape[dim])
    if "normalized_shape" in module.__dict__:
        setter(module, "normalized_shape", tuple(weight.shape))


def layer_sizes(config: Any, values: Mapping[str, int]) -> list[Sizes]:
    """What a layer's own config values (`per_layer_config`) change against the model's: quantity →
    (old, new).
    """
    changes = [
        {quantity: (_read(config, name), values[name])}
        for quantity, names in _SYNONYMS.items()
        for name in names
        if name in values and _has(config, name)
    ]
    sizes = {quantity: change for entry in reversed(changes) for quantity, change in entry.items()}
    heads, kv, width = (
        sizes.get(q) for q in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    kv_name = config_name(config, "num_key_value_heads")
    if kv_name and (heads or kv):
        heads = heads or (_read(config, "num_attention_heads"),) * 2
        kv = kv or (_read(config, kv_name),) * 2
        changes.append({"num_key_value_groups": (heads[0] // kv[0], heads[1] // kv[1])})
    if (heads or width) and (head_dim := _head_dim(config)):
        heads = heads or (_read(config, "num_attention_heads"),) * 2
        width = width or (head_dim, head_dim)
        changes.append({"attention_width": (heads[0] * width[0], heads[1] * width[1])})
    return changes


def single_kv_head(config: Any, layer: int | None, units: int) -> bool:
    """Whether all query heads of the layer read one key-value head, so that the units are query
    heads.
    """
    own = (
        per_layer_overrides(config).get(layer, {})
        if layer is not None and hasattr(config, "to_dict")
        else {}
    )
    values = [own.get(name, _read(config, name)) for name in _SYNONYMS["num_key_value_heads"]]
    return units > 1 and 1 in values


def _read(config: Any, name: str) -> Any:
    """A config attribute's global value, also where transformers calls it ambiguous."""
    reader = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return reader(name, None) if reader else getattr(config, name, None)


def config_name(config: Any, quantity: str) -> str | None:
    """What a config calls a size."""
    names = [name for name in _SYNONYMS[quantity] if _has(config, name)]
    return next(
        (name for name in names if _read(config, name) is not None), names[0] if names else None
    )


def config_values(config: Any, layer: Mapping[str, int], sizes: Sizes) -> dict[str, int]:
    """What a layer's config must say after a cut: config name → new size; `layer` holds what it
    says of its own now.
    """
    if "intermediate_size" in sizes and config_name(config, "intermediate_size") is None:
        config.intermediate_size = sizes["intermediate_size"][
            0
        ]  # a class that derives it: store it anyway
    if "head_dim" in sizes and config_name(config, "head_dim") is None:
        config.head_dim = sizes["head_dim"][0]
    values = {}
    for quantity, (old, new) in sizes.items():
        names = [name for name in _SYNONYMS.get(quantity, ()) if _has(config, name)]
        agreeing = [name for name in names if layer.get(name, _read(config, name)) == old]
        fallback = config_name(config, quantity) if quantity in _SYNONYMS else None
        name = agreeing[0] if agreeing else fallback
        if (
            name is not None
            and not _is_derived(config, name)
            and isinstance(_read(config, name), int | None)
        ):
            values[name] = new
    return values


def drop_layers(config: Any, layers: int, kept: list[int]) -> None:
    """Bring a config's count of layers in line, its lists with an entry per layer, and its lists of
    layers' indices.
    """
    config.__dict__.pop("pruned_sizes", None)
    for name, value in list(config.__dict__.items()):
        if name in _FIRST_LAYERS and type(value) is int and value <= layers:
            setattr(config, name, sum(index < value for index in kept))
        elif (
            isinstance(value, list | tuple)
            and name not in _NO_LAYERS
            and not name.startswith("_per_layer")
        ):
            new = _of_layers(name, list(value), layers, kept)
            if new is not None and new != list(value):
                setattr(config, name, type(value)(new))
    resize([config], {"num_hidden_layers": (layers, len(kept))})


def _of_layers(name: str, value: list[Any], layers: int, kept: list[int]) -> list[Any] | None:
    """What a config's list says of the layers kept; None where it isn't about layers."""
    if len(value) == layers:
        return [value[index] for index in kept]
    if value and all(
        isinstance(i, list | tuple) and len(i) == 2 and type(i[1]) is int for i in value
    ):  # run lengths
        entries = [entry for pattern, times in value for entry in list(pattern) * times]
        return [[[entries[index] for index in kept], 1]] if len(entries) == layers else None
    indices = all(type(i) is int and 0 <= i < layers for i in value) and len(set(value)) == len(
        value
    )
    return [kept.index(i) for i in value if i in kept] if indices and "layer" in name else None


def _is_derived(config: Any, name: str) -> bool:
    """Whether a config's class computes the value (a property without a setter)."""
    found = getattr(type(config), name, None)
    return isinstance(found, property) and found.fset is None


def _has(config: Any, name: str) -> bool:
    reader = getattr(config, "_hasattr_without_heterogeneous_validation", None)
    return reader(name) if reader else hasattr(config, name)


def set_per_layer(
    model: nn.Module, overrides: dict[int, dict[str, Any]], setter: Setter = setattr
) -> None:
    """Set the config's per-layer values and let every module inside a layer see its layer's.

    Where all layers agree the values become global ones (unless the config's class refuses them, as
    it does head counts that don't divide the hidden size, or takes the width of heads from them),
    and the config is an ordinary one again; attributes of modules outside the layers follow by
    `setter`.
    """
    config: Any = model.config
    config.__dict__.pop("pruned_sizes", None)  # of a folder it was loaded from
    keep_head_dim(config)
    overrides = {layer: dict(values) for layer, values in overrides.items()}
    config.per_layer_config = None
    names = {name for values in overrides.values() for name in values}
    columns = {
        n: {
            overrides.get(i, {}).get(n, getattr(config, n)) for i in range(config.num_hidden_layers)
        }
        for n in names
    }
    agreed = {name: min(column) for name, column in columns.items() if len(column) == 1}
    before = {name: getattr(config, name) for name in agreed}
    if agreed.keys() == columns.keys() and _become_global(model, agreed):
        overrides = {}
        outside = [
            module for path, module in model.named_modules() if layer_of(model, path) is None
        ]
        changed = {_quantity(name): (before[name], value) for name, value in agreed.items()}
        resize(outside, changed, setter)
    config.per_layer_config = {
        layer: values for layer, values in overrides.items() if values
    } or None
    give_views(model, overrides)


def _quantity(name: str) -> str:
    return next((quantity for quantity, names in _SYNONYMS.items() if name in names), name)


def keep_head_dim(config: Any) -> None:
    """Write down the width of heads that follows from the hidden size and the head count, before
    either changes.
    """
    if (head_dim := _head_dim(config)) and not isinstance(_read(config, "head_dim"), int):
        config.head_dim = head_dim


def keep_dense(config: Any, name: str) -> None:
    """Write down a size of the dense model, before it changes: its class derives others from it."""
    config.__dict__.pop("pruned_sizes", None)
    config.dense_sizes = {name: _read(config, name), **(_read(config, "dense_sizes") or {})}


def _become_global(model: nn.Module, values: Mapping[str, int]) -> bool:
    config: Any = model.config
    if "head_dim" in values:  # the class takes the scores' scale and the rotary frequencies from it
        return False
    known = {*getattr(config, "attribute_map", {}), *dir(type(config))}
    if not values.keys() <= known:
        return False
    before = {name: getattr(config, name) for name in values}
    derives = "head_dim" not in known and not values.keys().isdisjoint(
        _SYNONYMS["num_attention_heads"]
    )
    for name, value in values.items():
        setattr(config, name, value)
    try:
        config.validate_architecture()
        if not derives or _class_builds_its_layers(model):
            return True
    except ValueError:
        pass
    for name, value in before.items():
        setattr(config, name, value)
    return False


def _class_builds_its_layers(model: nn.Module) -> bool:
    """Whether the class builds layers of the model's shapes: it may take the width of heads from
    their number.
    """
    config: Any = copy.deepcopy(model.config)
    drop_layers(config, config.num_hidden_layers, [0])
    with as_dense(config), torch.device("meta"):
        built = getattr(type(model), "stock_class", type(model))(config)
    return all(
        p.shape == model.get_parameter(n).shape
        for n, p in built.named_parameters()
        if layer_of(built, n) == 0
    )


def _head_dim(config: Any) -> int | None:
    if isinstance(stored := _read(config, "head_dim"), int):
        return stored
    heads, hidden = _read(config, "num_attention_heads"), _read(config, "hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or not heads:
        return None
    return hidden // heads if hidden % heads == 0 else None
