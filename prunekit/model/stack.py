"""The decoder stack of a model: where it is, what its layers take and return, their own indices.

A stack is an outermost `ModuleList`, known by its type and not by its name. `place_in_stack` and
`layer_of` stand in `modeling_prunekit`, which is copied beside saved models.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prunekit.model.modeling_prunekit import layer_of, place_in_stack

# Attributes in which a layer may keep its own index, or that of another layer.
_INDEX = re.compile(r"(layer|block).*(idx|id|index|number)$|^(idx|index)$")


def module_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Path → `ModuleList`, those inside another one left out."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(lies_in(path, outer) for outer in lists):
            lists[path] = module
    return lists


def lies_in(path: str, outer: str) -> bool:
    """Whether a module or parameter lies inside the module at a path; all lie in the model, ""."""
    return not outer or path.startswith(f"{outer}.")


def layers_in(stack: nn.ModuleList) -> dict[int, nn.Module]:
    """Index → layer of a list; an entry may be None, and is left out."""
    entries: Iterable[nn.Module | None] = stack
    return {index: layer for index, layer in enumerate(entries) if layer is not None}


def all_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of all outermost `ModuleList`s, each once, in the model's order."""
    lists = module_lists(model).values()
    return list(dict.fromkeys(layer for stack in lists for layer in layers_in(stack).values()))


def main_stack(model: nn.Module) -> nn.ModuleList | None:
    """The outermost `ModuleList` without None in it that holds the most parameters, or None."""
    lists = [one for one in module_lists(model).values() if len(layers_in(one)) == len(one)]
    return max(lists, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=None)


def stacks_around(model: nn.Module, paths: Iterable[str]) -> set[str | None]:
    """The paths of the lists of layers around modules, with None for a module outside of lists."""
    places = [place_in_stack(model, path) for path in paths]
    return {None if place is None else place[0] for place in places}


def modules_of_layer(model: nn.Module, layer: int) -> list[nn.Module]:
    """Every module inside the layer of an index, of all lists of layers."""
    return [module for path, module in model.named_modules() if layer_of(model, path) == layer]


def config_around(model: nn.Module, path: str) -> Any:
    """The config of the nearest module around a path, or None."""
    while path:
        path = path.rpartition(".")[0]
        if "config" in (module := model.get_submodule(path)).__dict__:
            return module.config
    return None


def hidden_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states a layer is called with: its first tensor."""
    values = [*args, kwargs.get("hidden_states"), *kwargs.values()]
    return next((value for value in values if isinstance(value, Tensor)), None)


def hidden_of_output(output: Any) -> Tensor | None:
    """The hidden states a layer returns: its output, or the first of its outputs."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def index_attributes(stack: nn.ModuleList) -> Iterator[tuple[str, str, int]]:
    """The attributes in which every layer of a stack keeps its own index.

    Yields:
        Path inside a layer, name of the attribute, index that the first layer has (0 or 1).
    """
    for (path, name), values in _plain_attributes(stack).items():
        first = _first_index(values)
        # Under a name that says nothing of layers, equal numbers in two layers may be a
        # coincidence.
        if first is not None and (_INDEX.search(name) or (first == 0 and len(values) > 2)):
            yield path, name, first


def foreign_index(stack: nn.ModuleList) -> str | None:
    """An attribute in which layers keep the indices of other layers, by its path inside a layer."""
    for (path, name), values in _plain_attributes(stack).items():
        holds_numbers = any(type(value) is int for value in values.values())
        if _INDEX.search(name) and holds_numbers and _first_index(values) is None:
            return f"{path}.{name}".lstrip(".")
    return None


def _first_index(values: Mapping[int, Any]) -> int | None:
    """0 or 1, if every layer's value is its own index counted from this number; else None."""
    firsts = {value - index if type(value) is int else None for index, value in values.items()}
    return firsts.pop() if firsts in ({0}, {1}) else None


def _plain_attributes(stack: nn.ModuleList) -> dict[tuple[str, str], dict[int, Any]]:
    """(path inside a layer, attribute) → layer → value, of the numbers and strings layers keep."""
    attributes: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for index, layer in layers_in(stack).items():
        for path, module in layer.named_modules():
            for name, value in module.__dict__.items():
                if type(value) in (int, float, str, bool):
                    attributes[path, name][index] = value
    return attributes
