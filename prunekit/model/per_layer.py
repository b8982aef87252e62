"""Sizes that differ from layer to layer: the `per_layer_config` of transformers' configs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunekit.model.attributes import Setter, Sizes, resize
from prunekit.model.compat import has, read
from prunekit.model.depth import drop_layers
from prunekit.model.modeling_prunekit import (
    as_dense,
    give_views,
    has_own_layers,
    layer_of,
    per_layer_overrides,
)
from prunekit.model.names import SYNONYMS, config_name, head_dim_of, num_layers, quantity_of

Overrides = dict[int, dict[str, Any]]  # layer → the config values that only this layer has


def layer_sizes(config: Any, values: Mapping[str, int]) -> list[Sizes]:
    """The sizes of one layer that differ from the sizes of the whole model.

    Args:
        config: the config of the model.
        values: the entry of `per_layer_config` for the layer.

    Returns:
        Changes to make one after the other: a quantity may have several old values, under several
            names. The sizes that follow from these (query heads per key-value head, the width of
            all heads together) come last.
    """
    changes = [
        {quantity: (read(config, name), values[name])}
        for quantity, names in SYNONYMS.items()
        for name in names
        if name in values and has(config, name)
    ]
    # Where a quantity has several names, derived sizes follow the value of the first name.
    sizes = {quantity: change for entry in reversed(changes) for quantity, change in entry.items()}
    return changes + _derived_sizes(config, sizes)


def _derived_sizes(config: Any, sizes: Sizes) -> list[Sizes]:
    """The changes of sizes that follow from head counts and from the width of a head."""
    derived: list[Sizes] = []
    heads, kv, width = (
        sizes.get(q) for q in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    kv_name = config_name(config, "num_key_value_heads")
    if kv_name and (heads or kv):
        heads = heads or (read(config, "num_attention_heads"),) * 2
        kv = kv or (read(config, kv_name),) * 2
        derived.append({"num_key_value_groups": (heads[0] // kv[0], heads[1] // kv[1])})
    if (heads or width) and (head_dim := head_dim_of(config)):
        heads = heads or (read(config, "num_attention_heads"),) * 2
        width = width or (head_dim, head_dim)
        derived.append({"attention_width": (heads[0] * width[0], heads[1] * width[1])})
    return derived


def single_kv_head(config: Any, layer: int | None, units: int) -> bool:
    """Whether all query heads of a layer read one key-value head: then its units are query heads.

    Args:
        config: the config of the model, or None.
        layer: the layer's index, if the group lies in one.
        units: how many units the group has.
    """
    own: Mapping[str, Any] = {}
    if layer is not None and hasattr(config, "to_dict"):
        own = per_layer_overrides(config).get(layer, {})
    values = [own.get(name, read(config, name)) for name in SYNONYMS["num_key_value_heads"]]
    return units > 1 and 1 in values


def config_values(config: Any, layer: Mapping[str, int], sizes: Sizes) -> dict[str, int]:
    """The values of a layer's config after a cut: config name → new size.

    Args:
        config: the config of the model; sizes that its class derives from others are written into
            it.
        layer: the entry of `per_layer_config` for the layer before the cut.
        sizes: quantity → (old size, new size).
    """
    for quantity in ("intermediate_size", "head_dim"):
        if quantity in sizes and config_name(config, quantity) is None:
            setattr(config, quantity, sizes[quantity][0])
    values = {}
    for quantity, (old, new) in sizes.items():
        name = _name_of_size(config, layer, quantity, old)
        if name is not None and _can_be_stated(config, name):
            values[name] = new
    return values


def _name_of_size(config: Any, layer: Mapping[str, int], quantity: str, old: int) -> str | None:
    """The config's name for a quantity: the name that has the old size, else the first without one.

    Where all names have other sizes, the config says nothing of this one: heads of a state-space
    model beside those of attention.
    """
    if quantity not in SYNONYMS:
        return None
    for name in SYNONYMS[quantity]:
        if has(config, name) and layer.get(name, read(config, name)) == old:
            return name
    names = [name for name in SYNONYMS[quantity] if has(config, name)]
    return next((name for name in names if read(config, name) is None), None)


def _can_be_stated(config: Any, name: str) -> bool:
    """Whether a config stores a value itself, instead of computing it from other values."""
    attribute = getattr(type(config), name, None)
    computed = isinstance(attribute, property) and attribute.fset is None
    return not computed and isinstance(read(config, name), int | None)


def set_per_layer(model: nn.Module, overrides: Overrides, setter: Setter = setattr) -> None:
    """Set the config's values for single layers, and let the modules of each layer see its own.

    Where all layers agree, the values become global and the config is an ordinary one again;
    attributes of modules outside the layers follow. They stay values of single layers where the
    config's class refuses them (head counts that don't divide the hidden size), or where it would
    compute the width of heads from them.

    Args:
        model: a model of transformers.
        overrides: layer → config name → value; layers that agree with the config may be left out.
        setter: sets an attribute of a module.
    """
    config: Any = model.config
    if has_own_layers(config):
        keep_dense(config, "per_layer_config", per_layer_overrides(config))
    config.__dict__.pop("pruned_sizes", None)  # the record is of the folder that was loaded
    keep_head_dim(config)
    overrides = {layer: dict(values) for layer, values in overrides.items()}
    config.per_layer_config = None
    columns = _columns(config, overrides)
    agreed = {name: min(column) for name, column in columns.items() if len(column) == 1}
    before = {name: getattr(config, name) for name in agreed}
    if agreed.keys() == columns.keys() and _become_global(model, agreed):
        overrides = {}
        outside = [
            module for path, module in model.named_modules() if layer_of(model, path) is None
        ]
        changed = {quantity_of(name): (before[name], value) for name, value in agreed.items()}
        resize(outside, changed, setter)
    stated = {layer: values for layer, values in overrides.items() if values}
    config.per_layer_config = stated or None
    give_views(model, overrides)


def _columns(config: Any, overrides: Overrides) -> dict[str, set[Any]]:
    """Config name → the values that it has over the layers."""
    names = {name for values in overrides.values() for name in values}
    layers = range(num_layers(config) or 0)
    return {
        name: {overrides.get(layer, {}).get(name, getattr(config, name)) for layer in layers}
        for name in names
    }


def keep_head_dim(config: Any) -> None:
    """Write down the width of heads that follows from the hidden size and the head count.

    To be called before either changes.
    """
    if (head_dim := head_dim_of(config)) and not isinstance(read(config, "head_dim"), int):
        config.head_dim = head_dim


def keep_dense(config: Any, name: str, value: Any = None) -> None:
    """Write down a size of the dense model, from which its class derives others, in `dense_sizes`.

    To be called before the size changes.
    """
    config.__dict__.pop("pruned_sizes", None)
    value = read(config, name) if value is None else value
    config.dense_sizes = {name: value, **(read(config, "dense_sizes") or {})}


def _become_global(model: nn.Module, values: Mapping[str, int]) -> bool:
    """Set values in the model's config, or return False where its class can't have them."""
    config: Any = model.config
    # The class takes the scores' scale and the rotary frequencies from the width of a head, and can
    # make no layer without heads or channels.
    if "head_dim" in values or 0 in values.values():
        return False
    known = {*getattr(config, "attribute_map", {}), *dir(type(config))}
    if not values.keys() <= known:
        return False
    before = {name: getattr(config, name) for name in values}
    derives = "head_dim" not in known and not values.keys().isdisjoint(
        SYNONYMS["num_attention_heads"]
    )
    for name, value in values.items():
        setattr(config, name, value)
    try:
        config.validate_architecture()
        config.validate_rope()  # Phi-3 expects as many frequencies as follow from the head count
        if not derives or _class_builds_its_layers(model):
            return True
    except Exception:  # the class refuses them, or others that its config holds
        pass
    for name, value in before.items():
        setattr(config, name, value)
    return False


def _class_builds_its_layers(model: nn.Module) -> bool:
    """Whether the class builds layers of the model's shapes.

    It may take the width of heads from their number. One layer of it is built, on meta.
    """
    config: Any = copy.deepcopy(model.config)
    drop_layers(config, num_layers(config) or 0, [0])
    with as_dense(config), torch.device("meta"):
        dense = getattr(type(model), "stock_class", type(model))(config)
    return all(
        parameter.shape == model.get_parameter(name).shape
        for name, parameter in dense.named_parameters()
        if layer_of(dense, name) == 0
    )
