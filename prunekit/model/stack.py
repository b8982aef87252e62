"""The decoder stack of a model: its lists of layers, what a layer is given and returns, the indices
that layers keep.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_INDEX = re.compile(r"(layer|block).*(idx|id|index|number)$|^(idx|index)$")


def hidden_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states a layer is called with: its first tensor."""
    values = [*args, kwargs.get("hidden_states"), *kwargs.values()]
    return next((value for value in values if isinstance(value, Tensor)), None)


def hidden_of_output(output: Any) -> Tensor | None:
    """The hidden states a layer returns: its output, or the first of its outputs."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def module_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Path → `ModuleList`, those inside another left out."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            path.startswith(f"{outer}.") for outer in found
        ):
            found[path] = module
    return found


def all_layers(model: nn.Module) -> list[nn.Module]:
    """The entries of all outermost `ModuleList`s, each once, in the model's order."""
    return list(dict.fromkeys(layer for stack in module_lists(model).values() for layer in stack))


def _first_index(values: Mapping[int, Any]) -> int | None:
    """0 or 1 where every layer's value is its own index, counted from there."""
    firsts = {value - index if type(value) is int else None for index, value in values.items()}
    return firsts.pop() if firsts in ({0}, {1}) else None


def config_around(model: nn.Module, path: str) -> Any:
    """The config of the nearest module around a path, or None."""
    while path:
        path = path.rpartition(".")[0]
        if "config" in (module := model.get_submodule(path)).__dict__:
            return module.config
    return None


def layer_attributes(stack: nn.ModuleList) -> dict[tuple[str, str], dict[int, Any]]:
    """(path inside a layer, attribute) → layer → value, for the plain numbers and strings that the
    layers keep.
    """
    found: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for index, layer in enumerate(stack):
        for path, module in layer.named_modules():
            for name, value in module.__dict__.items():
                if type(value) in (int, float, str, bool):
                    found[path, name][index] = value
    return found


def index_attributes(stack: nn.ModuleList) -> Iterator[tuple[str, str, int]]:
    """The (path inside a layer, attribute, first index) of the attributes in which every layer
    keeps its own index.
    """
    for (path, name), values in layer_attributes(stack).items():
        first = _first_index(values)
        if first is not None and (_INDEX.search(name) or (first == 0 and len(values) > 2)):
            yield path, name, first
