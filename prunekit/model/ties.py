"""Tensors that a model holds under several names, and where they are held."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn


def shared_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The canonical name of every tensor with more than one → all its names."""
    names: dict[int, list[str]] = defaultdict(list)
    pairs = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in pairs:
        names[id(tensor)].append(name)
    return {every[0]: tuple(every) for every in names.values() if len(every) > 1}


def names_after(
    names: Iterable[str], aliases: Mapping[str, Sequence[str]], dropped: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """Canonical names of tensors → those once these layers (list's path → indices) are gone; none
    for what goes.
    """
    found = {}
    for name in names:
        every = (_name_after(alias, dropped) for alias in aliases.get(name, (name,)))
        if (left := next((alias for alias in every if alias is not None), None)) is not None:
            found[name] = left
    return found


def _name_after(name: str, dropped: Mapping[str, Sequence[int]]) -> str | None:
    for path, layers in dropped.items():
        if name.startswith(f"{path}."):
            index, _, rest = name[len(path) + 1 :].partition(".")
            if int(index) in layers:
                return None
            return f"{path}.{int(index) - sum(layer < int(index) for layer in layers)}.{rest}"
    return name


def tensor_places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Canonical name of every parameter and buffer → every (module, attribute) that holds it."""
    names: dict[int, str] = {}
    places: dict[str, list[tuple[nn.Module, str]]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                name = names.setdefault(
                    id(tensor), f"{prefix}.{attribute}" if prefix else attribute
                )
                places[name].append((module, attribute))
    return dict(places)


def tied_places(model: nn.Module) -> list[list[tuple[nn.Module, str, str]]]:
    """Of every parameter all its places, the first one first: (module, attribute, name)."""
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(id(parameter), []).append((module, attribute, name))
    return list(places.values())
