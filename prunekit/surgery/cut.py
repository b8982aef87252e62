"""Cut a model: slice its tensors, drop its layers, let attributes and config follow.

Whether the cut model computes the right outputs is checked elsewhere (`surgery.check`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunekit.errors import SurgeryError
from prunekit.graph import CouplingGraph
from prunekit.graph.groups import kept_positions
from prunekit.model.attributes import fit_to_weight
from prunekit.model.modeling_prunekit import empty_class, layer_of
from prunekit.model.ties import Place, tensor_places
from prunekit.plan import PruningPlan
from prunekit.surgery.attributes import Attempt, without_guesses
from prunekit.surgery.changes import Changes
from prunekit.surgery.configs import config_to_cut, update_config
from prunekit.surgery.layers import drop_layers, leave_out_dropped
from prunekit.surgery.sizes import measure_cut


def cut_model(
    model: nn.Module,
    graph: CouplingGraph,
    removed: Mapping[str, list[int]],
    attempt: Attempt | None = None,
) -> Changes:
    """Remove units and whole layers from a model, in place, without running it.

    Args:
        model: what the graph was traced from, not cut yet.
        graph: the graph of the model.
        removed: name of a group → unit indices, as in a plan that fits the graph.
        attempt: how attributes are found that have to follow; without guesses by default.

    Returns:
        What was changed, to undo it. On any error the model is as it was.
    """
    changes = Changes(model)
    try:
        if left := leave_out_dropped(graph, removed):
            _cut_units(model, graph, left, attempt or without_guesses(), changes)
        for stack in graph.stacks:
            if stack.name in removed:
                drop_layers(model, stack, removed[stack.name], changes)
    except BaseException:
        changes.undo()
        raise
    return changes


def cut_layer(
    model: nn.Module,
    graph: CouplingGraph,
    removed: Mapping[str, list[int]],
    attempt: Attempt | None = None,
) -> Changes:
    """Remove units of one layer's groups, in place, as `apply_plan` does, but without a check.

    The layer's weights may be loaded or on meta, the other layers' likewise. Layers share no unit:
    cut one after another they leave what one plan for all of them leaves. Comparing the layer's
    outputs before and after is up to the caller.

    Args:
        model: what the graph was traced from; this layer not cut yet.
        graph: the graph of the whole dense model.
        removed: name of a group → unit indices, each once; all groups of one layer.
        attempt: how attributes are found that have to follow; without guesses by default.

    Returns:
        What was changed, to undo it.

    Raises:
        TraceError: the units don't fit the graph.
        SurgeryError: a group lies in no layer or another one, or is shared with one. On any error
            the model is as it was.
    """
    plan = PruningPlan(removed)
    plan.check(graph)
    check_one_layer(model, graph, plan)
    return cut_model(model, graph, plan.removed, attempt)


def check_one_layer(model: nn.Module, graph: CouplingGraph, plan: PruningPlan) -> None:
    """Raise SurgeryError where a group lies in no layer or another one, or is shared with one."""
    layers = {name: graph[name].layer for name in plan.removed}
    if len(set(layers.values())) > 1 or None in layers.values():
        listed = ", ".join(f"{name} (layer {layer})" for name, layer in layers.items())
        raise SurgeryError(f"expected groups of one layer, got {listed}")
    for name, layer in layers.items():
        for member in graph[name].members:
            for alias in graph.aliases.get(member.parameter, (member.parameter,)):
                if layer_of(model, alias) != layer:
                    raise SurgeryError(
                        f"{name}: expected all of it in layer {layer}, {alias} is not"
                    )


def _cut_units(
    model: nn.Module,
    graph: CouplingGraph,
    removed: Mapping[str, list[int]],
    attempt: Attempt,
    changes: Changes,
) -> None:
    gone: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, units in removed.items():
        for member in graph[name].members:
            gone[member.parameter][member.dim].append(member.index[units].flatten())
    places = tensor_places(model)
    for name, dims in gone.items():
        positions = {dim: torch.cat(parts) for dim, parts in dims.items()}
        slice_tensor(places[name], positions, changes)
    for module in model.modules():  # wrappers that repeat the sizes of what they wrap
        if "in_features" in module.__dict__:
            fit_to_weight(module, changes.set)
    config = config_to_cut(model)
    sizes = measure_cut(model, graph, removed, config)
    attempt.follow(sizes, changes)
    if config is not None:
        update_config(config, sizes, changes)
    for name, units in removed.items():
        if len(units) == graph[name].num_units and (sublayer := graph[name].sublayer):
            module = model.get_submodule(sublayer.module)
            empty = empty_class(type(module), sublayer.consumer, sublayer.outputs)
            changes.set(module, "__class__", empty)


def slice_tensor(places: list[Place], removed: Mapping[int, Tensor], changes: Changes) -> None:
    """Cut a tensor, and its gradient, in all places that hold it; `removed`: dim → positions."""
    module, attribute, _ = places[0]
    old = getattr(module, attribute)
    kept = {
        dim: kept_positions(old.shape[dim], positions).to(old.device)
        for dim, positions in removed.items()
    }
    new = _select(old.detach(), kept)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        if old.grad is not None:
            new.grad = _select(old.grad, kept)
    for module, attribute, _ in places:
        changes.set(module, attribute, new)
        changes.persist(module, attribute)
        fit_to_weight(module, changes.set)


def _select(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    for dim, positions in kept.items():
        tensor = tensor.index_select(dim, positions)
    return tensor.contiguous()
