"""Whole layers: pass them over, or take them out of their list and of all counts of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunekit.graph import CouplingGraph, LayerStack
from prunekit.model.attributes import resize
from prunekit.model.depth import drop_layers as drop_from_config
from prunekit.model.modeling_prunekit import per_layer_overrides
from prunekit.model.per_layer import set_per_layer
from prunekit.model.stack import config_around, hidden_of_call, hidden_of_output, index_attributes
from prunekit.surgery.changes import Changes
from prunekit.surgery.sizes import outer_paths


def leave_out_dropped(
    graph: CouplingGraph, removed: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """The part of `removed` that must be cut unit by unit.

    Stacks are left out, and so are groups all of whose members lie in dropped layers.
    """
    left = graph.names_after(removed)
    members = {name: {member.parameter for member in graph[name].members} for name in removed}
    return {name: units for name, units in removed.items() if members[name] & left.keys()}


@contextmanager
def passing_over(
    model: nn.Module, graph: CouplingGraph, removed: Mapping[str, list[int]]
) -> Iterator[None]:
    """Let dropped layers return the hidden states that they were given, inside a `with` block.

    They still run, so that caches and whatever else they return stay as they are.
    """
    with ExitStack() as hooks:
        for stack in graph.stacks:
            layers = model.get_submodule(stack.module)
            for index in removed.get(stack.name, ()):
                for handle in _pass_over(layers.get_submodule(str(index))):
                    hooks.callback(handle.remove)
        yield


def _pass_over(layer: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """Hook a layer so that its hidden states go past it; the handles remove the hooks."""
    entered: list[Tensor] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = hidden_of_call(args, kwargs)
        assert hidden is not None
        entered[:] = [hidden.clone()]  # the layer may write into its input

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        was = hidden_of_output(output)
        assert was is not None
        hidden = entered.pop().to(was.device)
        return hidden if isinstance(output, Tensor) else type(output)([hidden, *output[1:]])

    return (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    )


def drop_layers(model: nn.Module, stack: LayerStack, removed: list[int], changes: Changes) -> None:
    """Take layers out of their list; counts of layers and indices of layers follow.

    Args:
        model: the model, whose other groups are cut already.
        stack: one of `graph.stacks`.
        removed: indices of the layers to drop.
        changes: takes note of what is changed.
    """
    layers: Any = model.get_submodule(stack.module)
    kept = [index for index in range(stack.num_units) if index not in removed]
    for path, name, first in list(index_attributes(layers)):
        for new, old in enumerate(kept):
            module = _find_submodule(layers[old], path)
            if module is not None and name in module.__dict__:
                changes.set(module, name, new + first)
    changes.set(layers, "_modules", {str(new): layers[old] for new, old in enumerate(kept)})
    around = [model.get_submodule(path) for path in outer_paths(stack.module)]
    resize(around, {"num_hidden_layers": (stack.num_units, len(kept))}, changes.set)
    if (config := config_around(model, stack.module)) is not None:
        changes.remember_configs(config)
        _update_config(model, config, stack.num_units, kept, changes)


def _update_config(
    model: nn.Module, config: Any, layers: int, kept: list[int], changes: Changes
) -> None:
    """Drop layers from a config; a layer's own values move to its new index."""
    is_models = config is getattr(model, "config", None) and hasattr(config, "per_layer_config")
    overrides = per_layer_overrides(config) if is_models else {}
    if overrides:
        config.per_layer_config = None
    drop_from_config(config, layers, kept)
    if overrides:
        moved = {new: overrides[old] for new, old in enumerate(kept) if old in overrides}
        set_per_layer(model, moved, changes.set)


def _find_submodule(layer: nn.Module, path: str) -> nn.Module | None:
    """The module at a path inside a layer; None where the layer has no such module."""
    return dict(layer.named_modules()).get(path)
