"""A model's config in line with a cut: its global values, and each layer's own."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from prunekit.model.attributes import Sizes, resize
from prunekit.model.modeling_prunekit import layer_of, per_layer_overrides
from prunekit.model.names import config_name, num_layers
from prunekit.model.per_layer import (
    config_values,
    keep_dense,
    keep_head_dim,
    set_per_layer,
)
from prunekit.surgery.changes import Changes
from prunekit.surgery.sizes import CutSizes


def config_to_cut(model: nn.Module) -> Any:
    """The config that has to follow a cut, or None.

    It follows where it describes one list of layers: not that of an encoder and a decoder, nor one
    of several configs. Their record alone tells the sizes that the class would not make.
    """
    config: Any = getattr(model, "config", None)
    several = getattr(config, "is_encoder_decoder", False) or getattr(config, "sub_configs", None)
    return None if several else config


def update_config(config: Any, sizes: CutSizes, changes: Changes) -> None:
    """Bring a config in line with a cut; groups inside a layer change that layer's values only."""
    for name, quantities in sizes.by_group.items():
        if sizes.graph[name].layer is None:
            if "hidden_size" in quantities:
                changes.remember_configs(config)
                keep_head_dim(config)
                if (own := config_name(config, "hidden_size")) is not None:
                    keep_dense(config, own)
            resize([config], quantities, changes.set)
    layers = _sizes_by_layer(sizes)
    if layers and num_layers(config) and hasattr(config, "per_layer_config"):
        _update_layers(config, layers, sizes.model, changes)


def _sizes_by_layer(sizes: CutSizes) -> dict[int, list[Sizes]]:
    """Index of a layer → the sizes of it that change, group by group, then heads' widths."""
    layers: dict[int, list[Sizes]] = defaultdict(list)
    for name, quantities in sizes.by_group.items():
        if (layer := sizes.graph[name].layer) is not None:
            layers[layer].append(quantities)
    for path, noted in sizes.by_module.items():
        if "head_dim" in noted and (layer := layer_of(sizes.model, path)) is not None:
            layers[layer].append({"head_dim": noted["head_dim"]})
    return layers


def _agreed(stated: list[dict[str, int]]) -> dict[str, int]:
    """What several groups of a layer say of a config's values, where no two say different things.

    A layer with two kinds of heads has no single number of heads.
    """
    merged: dict[str, set[int]] = defaultdict(set)
    for values in stated:
        for name, value in values.items():
            merged[name].add(value)
    return {name: min(found) for name, found in merged.items() if len(found) == 1}


def _update_layers(
    config: Any, layers: dict[int, list[Sizes]], model: nn.Module, changes: Changes
) -> None:
    changes.remember_configs(config)
    overrides = per_layer_overrides(config)
    for layer, cut in layers.items():
        own = overrides.setdefault(layer, {})
        # All values are read before the first is written: one size may stand for another.
        own.update(_agreed([config_values(config, own, quantities) for quantities in cut]))
    set_per_layer(model, overrides, changes.set)
