"""Tensors that a model holds in several places, under several names.

The *canonical* name of a tensor is the first of its names, the one that `named_parameters` lists.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn


class Place(NamedTuple):
    """One place where a parameter or buffer is held: `getattr(module, attribute)`, by its name."""

    module: nn.Module
    attribute: str
    name: str


def tensor_places(model: nn.Module) -> dict[str, list[Place]]:
    """Canonical name of every parameter and buffer → all its places, the canonical one first."""
    places: dict[int, list[Place]] = defaultdict(list)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                name = f"{prefix}.{attribute}".lstrip(".")
                places[id(tensor)].append(Place(module, attribute, name))
    return {own[0].name: own for own in places.values()}


def parameter_places(model: nn.Module) -> dict[str, list[Place]]:
    """As `tensor_places`, of the parameters only."""
    return {
        name: places
        for name, places in tensor_places(model).items()
        if places[0].attribute in places[0].module._parameters
    }


def shared_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Canonical name of every tensor that has more than one name → all its names."""
    return {
        name: tuple(place.name for place in places)
        for name, places in tensor_places(model).items()
        if len(places) > 1
    }


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every tensor → its canonical name."""
    return {place.name: name for name, places in tensor_places(model).items() for place in places}


def names_after(
    names: Iterable[str], aliases: Mapping[str, Sequence[str]], dropped: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """Canonical names of tensors → their canonical names once some layers are gone.

    A tensor that is held in dropped layers only has none.

    Args:
        names: canonical names to translate.
        aliases: canonical name of a shared tensor → all its names.
        dropped: path of a list of layers → indices of the layers that are dropped from it.
    """
    translated = {}
    for name in names:
        every = (_name_after(alias, dropped) for alias in aliases.get(name, (name,)))
        if (left := next((alias for alias in every if alias is not None), None)) is not None:
            translated[name] = left
    return translated


def _name_after(name: str, dropped: Mapping[str, Sequence[int]]) -> str | None:
    for path, layers in dropped.items():
        if name.startswith(f"{path}."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            if int(index) in layers:
                return None
            return f"{path}.{int(index) - sum(layer < int(index) for layer in layers)}.{rest}"
    return name
