"""Whole layers: pass them over, or take them out of their list with everything that counts layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from prunekit.graph import CouplingGraph, Group
from prunekit.model.attributes import Setter, resize
from prunekit.model.depth import drop_layers
from prunekit.model.modeling_prunekit import per_layer_overrides
from prunekit.model.per_layer import set_per_layer
from prunekit.model.stack import config_around, hidden_of_call, hidden_of_output, index_attributes


def surviving(graph: CouplingGraph, removed: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """What of a plan is left to cut beside its layers: groups that lie wholly in dropped ones left
    out, and stacks.
    """
    left = graph.names_after(removed)
    members = {name: {member.parameter for member in graph[name].members} for name in removed}
    return {name: units for name, units in removed.items() if members[name] & left.keys()}


@contextmanager
def passed_over(
    model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]
) -> Iterator[None]:
    """Let the plan's layers return the hidden states they were given, for the duration of a `with`
    block.

    They still run, so that caches and whatever else they return stay as they are.
    """
    with ExitStack() as hooks:
        for stack in graph.stacks:
            layers = model.get_submodule(stack.module)
            for index in removed.get(stack.name, ()):
                for handle in _pass_over(layers.get_submodule(str(index))):
                    hooks.callback(handle.remove)
        yield


def _pass_over(layer: nn.Module) -> tuple[Any, Any]:
    entered: list[Tensor] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = hidden_of_call(args, kwargs)
        assert hidden is not None
        entered[:] = [hidden.clone()]  # the layer may write into it

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        was = hidden_of_output(output)
        assert was is not None
        hidden = entered.pop().to(was.device)
        return hidden if isinstance(output, Tensor) else type(output)([hidden, *output[1:]])

    return (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    )


def drop(
    model: nn.Module,
    stack: Group,
    removed: list[int],
    setter: Setter,
    remember: Callable[[Any], None],
) -> None:
    """Take layers out of their list; what counts layers or names them by their index follows.

    Args:
        model: the model, whose other groups are cut already.
        stack: a group of `graph.stacks`.
        removed: indices of the layers to drop.
        setter: changes an attribute.
        remember: is called with a config before it changes.
    """
    layers: Any = model.get_submodule(stack.module)
    kept = [index for index in range(stack.num_units) if index not in removed]
    for path, name, first in list(index_attributes(layers)):
        for new, old in enumerate(kept):
            module = _submodule(layers[old], path)
            if module is not None and name in module.__dict__:
                setter(module, name, new + first)
    setter(layers, "_modules", {str(new): layers[old] for new, old in enumerate(kept)})
    around = [model.get_submodule(path) for path in _outer_paths(stack.module)]
    resize(around, {"num_hidden_layers": (stack.num_units, len(kept))}, setter)
    if (config := config_around(model, stack.module)) is not None:
        remember(config)
        _configure(model, config, stack.num_units, kept, setter)


def _configure(model: nn.Module, config: Any, layers: int, kept: list[int], setter: Setter) -> None:
    own = config is getattr(model, "config", None) and hasattr(config, "per_layer_config")
    overrides = per_layer_overrides(config) if own else {}
    if overrides:
        config.per_layer_config = None
    drop_layers(config, layers, kept)
    if overrides:
        set_per_layer(
            model, {new: overrides[old] for new, old in enumerate(kept) if old in overrides}, setter
        )


def _submodule(layer: nn.Module, path: str) -> nn.Module | None:
    """Layers need not be alike: the module at a path inside one, or None."""
    return dict(layer.named_modules()).get(path)


def _outer_paths(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]
