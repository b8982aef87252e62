"""Entries of a config for single layers, brought in line when layers are dropped."""

from __future__ import annotations

from typing import Any

from prunekit.model.attributes import resize
from prunekit.model.names import FIRST_LAYERS, NO_LAYERS


def drop_layers(config: Any, layers: int, kept: list[int]) -> None:
    """Let a config describe the kept layers only.

    Its count of layers changes, its lists with an entry per layer, its lists of layers' indices,
    and its counts of the layers of one sort at the beginning.

    Args:
        config: a config of transformers; changed in place.
        layers: how many layers it describes.
        kept: indices of the layers to keep, in order.
    """
    config.__dict__.pop("pruned_sizes", None)
    for name, value in list(config.__dict__.items()):
        if name in FIRST_LAYERS and type(value) is int and value <= layers:
            setattr(config, name, sum(index < value for index in kept))
        elif isinstance(value, list | tuple) and _may_list_layers(name):
            new = _entries_of_kept(name, list(value), layers, kept)
            if new is not None and new != list(value):
                setattr(config, name, type(value)(new))
    resize([config], {"num_hidden_layers": (layers, len(kept))})


def _may_list_layers(name: str) -> bool:
    return name not in NO_LAYERS and not name.startswith("_per_layer")


def _entries_of_kept(name: str, value: list[Any], layers: int, kept: list[int]) -> list[Any] | None:
    """The entries of a list for the kept layers; None where the list isn't about layers."""
    if len(value) == layers:
        return [value[index] for index in kept]
    if value and all(map(_is_run, value)):
        entries = [entry for pattern, times in value for entry in list(pattern) * times]
        return [[[entries[index] for index in kept], 1]] if len(entries) == layers else None
    are_indices = all(type(index) is int and 0 <= index < layers for index in value)
    if "layer" not in name or not are_indices or len(set(value)) != len(value):
        return None
    return [kept.index(index) for index in value if index in kept]


def _is_run(entry: Any) -> bool:
    """Whether an entry is a run length: a pattern of layers, and how often it is repeated."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and type(entry[1]) is int
