"""Units of a cut model, counted by tracing it again, with one layer of each structure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from types import BuiltinFunctionType, FunctionType

import torch
from torch import Tensor, nn

from prunekit.errors import TraceError
from prunekit.graph import CouplingGraph, trace
from prunekit.graph.capture import meta_copy
from prunekit.graph.groups import Group, Member, ParameterDim, kept_positions
from prunekit.graph.stacks import find_misfit
from prunekit.model.modeling_prunekit import empty_sublayers
from prunekit.model.stack import index_attributes, layers_in
from prunekit.surgery.changes import Changes
from prunekit.surgery.fault import Fault
from prunekit.surgery.layers import drop_layers, leave_out_dropped

Removed = Mapping[str, list[int]]


def count_units(
    model: nn.Module, graph: CouplingGraph, removed: Removed, seen: Collection[ParameterDim] = ()
) -> Fault | None:
    """Look for a group of a cut model that has another number of units than were left.

    The model is traced again, unless every group was seen; a model that can't be traced passes if
    it was run, because its outputs were compared. Only a trace with all layers tells a fault: what
    runs beside the layers may take one of their own for each.

    Args:
        model: the cut model.
        graph: the graph of the uncut model.
        removed: name of a group → unit indices.
        seen: (parameter, dim) of consumers whose inputs are known to be right; their groups need no
            counting.
    """
    if fault := _check_stacks(model, graph, removed):
        return fault
    groups = [graph[name] for name in leave_out_dropped(graph, removed)]
    if all(_is_seen(group, seen) for group in groups):
        return None
    skeleton, left_out = _keep_one_of_each(model, graph, removed)
    with suppress(TraceError):
        if _count(skeleton, graph, left_out) is None:
            return None
    try:
        return _count(meta_copy(model), graph, removed)
    except TraceError as error:  # the model may have hooks that can't be traced
        return Fault(text=str(error)) if next(model.parameters()).is_meta else None


def _count(skeleton: nn.Module, graph: CouplingGraph, removed: Removed) -> Fault | None:
    """Trace a copy of the cut model and count its units; TraceError where it can't be traced."""
    again = trace(skeleton, graph.example_inputs)
    return _check_groups(graph, again, removed, empty_sublayers(skeleton))


def _is_seen(group: Group, seen: Collection[ParameterDim]) -> bool:
    """Whether all consumers of a group were seen; one whose units no consumer reads never is."""
    dims = [(member.parameter, member.dim) for member in group.consumers]
    return bool(dims) and all(own in seen for own in dims)


def _check_stacks(model: nn.Module, graph: CouplingGraph, removed: Removed) -> Fault | None:
    """A shortened stack that can't be pruned any more has lost its config's count or its order."""
    for stack in graph.stacks:
        if stack.name in removed:
            layers = model.get_submodule(stack.module)
            assert isinstance(layers, nn.ModuleList)
            if len(layers) > 1 and (reason := find_misfit(model, stack.module, layers)):
                return Fault(text=reason, group=stack.name)
    return None


def _keep_one_of_each(
    model: nn.Module, graph: CouplingGraph, removed: Removed
) -> tuple[nn.Module, dict[str, list[int]]]:
    """A copy of the cut model on meta, without the layers that are like an earlier one.

    Returns:
        The copy, and `removed` with the layers that it lacks.
    """
    skeleton, everything = meta_copy(model), dict(removed)
    for stack in graph.stacks:
        layers = skeleton.get_submodule(stack.module)
        assert isinstance(layers, nn.ModuleList)
        if not stack.prunable or find_misfit(skeleton, stack.module, layers):
            continue  # its layers can't be passed over
        dropped = removed.get(stack.name, [])
        old = [index for index in range(stack.num_units) if index not in dropped]
        if repeated := _repeated_layers(layers):
            here = replace(stack, num_units=len(layers))
            drop_layers(skeleton, here, repeated, Changes(skeleton))
            everything[stack.name] = sorted([*dropped, *(old[index] for index in repeated)])
    return skeleton, everything


def _repeated_layers(layers: nn.ModuleList) -> list[int]:
    """The indices of the layers that differ in nothing but their index from an earlier layer."""
    known: set[Hashable] = set()
    repeated = []
    for index, structure in layer_structures(layers).items():
        if structure in known:
            repeated.append(index)
        known.add(structure)
    return repeated


def layer_structures(layers: nn.ModuleList) -> dict[int, Hashable]:
    """Index → a key for each layer, equal for layers that differ in nothing but their index."""
    own_index = {(path, name) for path, name, _ in index_attributes(layers)}
    return {index: _structure(layer, own_index) for index, layer in layers_in(layers).items()}


def _structure(layer: nn.Module, ignored: Collection[tuple[str, str]]) -> Hashable:
    """The modules of a layer, their tensors' shapes, the numbers, words, functions they keep."""
    parts: list[Hashable] = []
    for path, module in layer.named_modules():
        tensors = {**module._parameters, **module._buffers}
        shapes = [(name, tuple(t.shape)) for name, t in tensors.items() if t is not None]
        plain = [
            (name, tuple(value) if isinstance(value, list) else value)
            for name, value in sorted(vars(module).items())
            if _is_plain(value) and (path, name) not in ignored
        ]
        own = getattr(module.__dict__.get("config"), "__dict__", {}).get("_overrides", {})
        values = sorted((name, repr(value)) for name, value in own.items())
        parts.append((path, type(module), tuple(shapes), tuple(plain), tuple(values)))
    return tuple(parts)


def _is_plain(value: object) -> bool:
    """Whether a module's attribute is a number, a word, a function, or a list of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return type(value) in (bool, int, float, str, FunctionType, BuiltinFunctionType)


def _check_groups(
    graph: CouplingGraph, again: CouplingGraph, removed: Removed, empty: Iterable[str]
) -> Fault | None:
    """A group is known again by its members, under the names that they have after the cut.

    `empty` are the paths of modules without units: what is left of their weights isn't used.
    """
    idle = tuple(f"{path}." for path in empty)
    known: dict[frozenset[ParameterDim], list[Group]] = defaultdict(list)
    for group in again.groups:
        places = [(m.parameter, m.dim) for m in group.members if not m.parameter.startswith(idle)]
        known[frozenset(places)].append(group)
    names, gone = graph.names_after(removed), graph.positions(removed)
    for name, units in leave_out_dropped(graph, removed).items():
        left = graph[name].num_units - len(units)
        members = [m for m in graph[name].members if m.parameter in names]
        members = [m for m in members if not names[m.parameter].startswith(idle)]
        if left <= 1 or not members:  # one unit left has no axis, and so no group
            continue
        read = known[frozenset((names[m.parameter], m.dim) for m in members)]
        counts = sorted({group.num_units for group in read})
        if left not in counts:
            text = f"the cut model reads {counts} units where {left} were left"
            return Fault(text=text, group=name)
        place = names[members[0].parameter], members[0].dim
        lost = gone.get((members[0].parameter, members[0].dim), ())
        expected = _positions_left(graph, graph[name], units, members[0], lost)
        if not any(torch.equal(expected, found) for g in read for found in _positions(g, place)):
            text = f"the cut model reads other units of {place[0]} than were left"
            return Fault(text=text, group=name)
    return None


def _positions_left(
    graph: CouplingGraph, group: Group, units: list[int], member: Member, lost: Collection[int]
) -> Tensor:
    """Where what is left of a group lies in a member's dim after the cut, rising.

    `units` are those that the group lost, `lost` the positions of the dim that any group did.
    """
    kept = kept_positions(group.num_units, units)
    left = kept_positions(graph.shapes[member.parameter][member.dim], sorted(lost))
    return torch.isin(left, member.index[kept]).nonzero().flatten()


def _positions(group: Group, place: ParameterDim) -> Iterator[Tensor]:
    """The positions of a dim that a group owns, rising, for each member there."""
    for member in group.members:
        if (member.parameter, member.dim) == place:
            yield member.index.unique()
