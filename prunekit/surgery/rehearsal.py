"""A cut tried before any work: which groups must stay whole.

The tracer tells what must be cut together, and not what else a module needs: it may split by a
number of which nothing tells how it changes, or take heads by fours only. So the functions that cut
a model cut a copy of it first, which has no weights and runs in an instant. Then what the model
computes is compared (`surgery.trial`).
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from prunekit.errors import CheckpointError, SurgeryError
from prunekit.graph import CouplingGraph, Group
from prunekit.graph.capture import as_under_export, meta_copy
from prunekit.graph.choices import WAYS
from prunekit.graph.example import longer_example, twice_as_long
from prunekit.graph.groups import ParameterDim, sort_by_likeness
from prunekit.model.modeling_prunekit import place_in_stack
from prunekit.model.verify import required_record
from prunekit.model.wrappers import without_hooks
from prunekit.surgery.attempts import cut_until_right
from prunekit.surgery.attributes import Attempt
from prunekit.surgery.changes import Changes
from prunekit.surgery.check import compare_shapes
from prunekit.surgery.counting import count_units, layer_structures
from prunekit.surgery.cut import cut_model
from prunekit.surgery.fault import Fault
from prunekit.surgery.masking import run_example, run_inputs
from prunekit.surgery.shapes import find_needed_multiples
from prunekit.surgery.sizes import HEADS
from prunekit.surgery.trial import Trial, outer_units

_COUNTED = (*HEADS, "expert")  # kinds whose units some modules take in certain numbers only
_Removed = Mapping[str, list[int]]


def rehearse(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    *,
    saved: bool = False,
    batch: Mapping[str, Any] | None = None,
) -> CouplingGraph:
    """Find which of these groups the model can't lose units of.

    The smallest cut of all groups together is tried first, on a copy without weights. Where it
    fails, groups are tried one by one; one stands for all that are like it, in layers that are
    alike. Where heads or experts can't go one by one, a number in which they can is looked for.
    Then cuts of the model itself are compared with the masked model, and undone.

    Args:
        model: the model, left as it was; its weights may be on meta, where nothing is compared.
        graph: its graph.
        groups: the groups that are to be cut, all prunable.
        saved: whether the model is to be saved; else its class may refuse a cut model if it refuses
            the uncut one, too.
        batch: what the graph's example was taken from: the first samples of it are compared on,
            too, where they are longer.

    Returns:
        The graph; groups that can't be cut are not prunable any more and have the reason, others
        may have a `multiple`.

    Raises:
        SurgeryError: each group can be cut, but not all of them together, and it isn't one kind of
            them that is in the way.
    """
    if verdicts := dict(_judge_cache(model, graph, groups)):
        graph = _change(graph, verdicts)
        groups = [group for group in groups if group.name not in verdicts]
    stage = _Stage.build(model, graph, saved)
    if stage.find_fault(_smallest_cuts(model, groups)) is None:
        return _compare(model, graph, groups, batch)
    graph = _change(graph, dict(_judge(model, stage, groups)))
    left = [group for group in (graph[group.name] for group in groups) if group.prunable]
    if fault := stage.find_fault(_smallest_cuts(model, left)):
        alike = _find_in_the_way(model, stage, left)
        if alike is None:
            raise SurgeryError(
                f"each of the groups can be cut, but not all together: {fault}; expected some of "
                "them in scope.exclude"
            )
        reason = f"it can't be cut together with the other groups: {fault}"
        stays = {"prunable": False, "exact": False, "reason": reason}
        graph = _change(graph, {group.name: stays for group in alike})
        left = [group for group in left if group not in alike]
    return _compare(model, graph, left, batch)


def _compare(
    model: nn.Module, graph: CouplingGraph, groups: Sequence[Group], batch: Mapping[str, Any] | None
) -> CouplingGraph:
    """Find the groups without units of which the model computes something else than masked.

    Inexact groups can't be compared, and nothing can while the weights are on meta.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return graph
    alike = _sort_by_structure(model, groups)
    cuts = {
        key: outer_units(_smallest_cuts(model, first), first)
        for key, (first, *_) in alike.items()
        if all(group.exact for group in first)
    }
    longer = [] if batch is None else _find_longer(model, batch, graph)
    verdicts = {
        group.name: {"prunable": False, "exact": False, "reason": _explain(fault)}
        for key, fault in Trial(model=model, graph=graph, longer=longer).find_faults(cuts).items()
        for bundle in alike[key]
        for group in bundle
    }
    return _change(graph, verdicts) if verdicts else graph


def _find_longer(
    model: nn.Module, batch: Mapping[str, Any], graph: CouplingGraph
) -> list[Mapping[str, Any]]:
    """Samples of a batch as long as they are, and twice as long, where the model takes these."""
    whole = longer_example(model, batch, graph)
    found: list[Mapping[str, Any]] = [] if whole is None else [whole]
    for samples in twice_as_long(model, batch):
        with suppress(Exception):
            run_inputs(model, samples)
            return [*found, samples]
    return found


def _explain(fault: str) -> str:
    """The reason of groups in several layers, given what was found in one of them."""
    where = re.sub(r"(?<=[a-z_])\.\d+(?=[. ])", ".*", fault)
    return f"a number or a slice in its code doesn't follow the cut: {where}"


def _change(graph: CouplingGraph, verdicts: Mapping[str, dict[str, Any]]) -> CouplingGraph:
    """The graph with other attributes of some groups: name → attribute → value."""
    return replace(
        graph,
        groups=tuple(replace(group, **verdicts.get(group.name, {})) for group in graph.groups),
        stacks=tuple(replace(stack, **verdicts.get(stack.name, {})) for stack in graph.stacks),
    )


def _judge_cache(
    model: nn.Module, graph: CouplingGraph, groups: Sequence[Group]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield groups whose cut a model's own kind of cache can't follow, and what is to be changed.

    A model without key-value cache may keep one tensor for the states of all layers, which is as
    wide as its config says (RWKV).
    """
    inputs = graph.example_inputs
    if not isinstance(inputs, Mapping) or inputs.get("use_cache") is not False:
        return
    if "past_key_values" in inspect.signature(model.forward).parameters:
        return
    with_cache = replace(graph, example_inputs={**inputs, "use_cache": True})
    stage = replace(_Stage.build(model, with_cache, saved=False), compares=False)
    if stage.outputs is None:
        return
    alike: dict[Hashable, list[Group]] = defaultdict(list)
    for group in groups:
        if group.layer is not None:
            alike[_key(group)].append(group)
    for own in alike.values():
        if fault := stage.find_fault(_smallest_cuts(model, own)):
            reason = f"the model can't run with its cache then: {fault}"
            for group in own:
                yield group.name, {"prunable": False, "exact": False, "reason": reason}


def _find_in_the_way(
    model: nn.Module, stage: _Stage, groups: Sequence[Group]
) -> list[Group] | None:
    """The first groups, alike in all layers, without which the others can be cut together.

    Of several groups of heads in a layer one is tried before all.
    """
    apart: dict[Hashable, list[Group]] = defaultdict(list)
    for group in groups:
        apart[_key(group)].append(group)
    for alike in [*apart.values(), *sort_by_likeness(groups).values()]:
        rest = [group for group in groups if group not in alike]
        if rest and stage.find_fault(_smallest_cuts(model, rest)) is None:
            return alike
    return None


def _key(group: Group) -> Hashable:
    """The likeness of a group, and which of several in its module it is."""
    is_alone = group.module.endswith(group.name)
    return group.likeness, "" if is_alone else group.name.rpartition(".")[2]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Stage:
    """Where cuts are rehearsed.

    Args:
        copy: the model on meta.
        graph: its graph.
        way: the context in which the copy runs, one of `WAYS`.
        outputs: the output tensors of the uncut copy; None where meta can't run it: then it is
            traced to see whether it runs.
        saved: whether its class must hold the cut model even if it can't hold the uncut one.
        compares: whether the outputs must keep their shapes; else it must run.
    """

    copy: nn.Module
    graph: CouplingGraph
    way: Callable[[], AbstractContextManager[Any]]
    outputs: Sequence[Tensor] | None
    saved: bool
    compares: bool = True

    @classmethod
    def build(cls, model: nn.Module, graph: CouplingGraph, saved: bool) -> _Stage:
        copy = without_hooks(meta_copy(model))
        stage = cls(copy=copy, graph=graph, way=nullcontext, outputs=None, saved=saved)
        for way in WAYS:
            ready = replace(stage, way=way)
            with suppress(Exception):  # it looks at numbers while it runs
                return replace(ready, outputs=ready._run())
        return stage

    def find_fault(self, removed: _Removed) -> str | None:
        """What is wrong with the model without these units; None: nothing."""
        last: list[Changes] = []

        def cut(attempt: Attempt) -> Changes:
            last[:] = [cut_model(self.copy, self.graph, removed, attempt)]
            return last[0]

        if fault := cut_until_right(cut, lambda: self._check(removed)):
            return fault.text.splitlines()[0]
        try:
            refusal = _refuse_saving(self.copy)
        finally:
            last[0].undo()
        return refusal if self.saved or self._can_be_saved else None

    @cached_property
    def _can_be_saved(self) -> bool:
        return _refuse_saving(self.copy) is None

    def _check(self, removed: _Removed) -> Fault | None:
        if self.outputs is None:
            return count_units(self.copy, self.graph, removed)
        outputs = self._run()
        if not self.compares:
            return None
        fault = compare_shapes(self.outputs, outputs)
        counts = fault is None and _share_dims(self.graph, removed)
        return count_units(self.copy, self.graph, removed) if counts else fault

    def _run(self) -> list[Tensor]:
        with self.way():
            return _run(self.copy, self.graph)


def _refuse_saving(model: nn.Module) -> str | None:
    """Why a model can't be saved, if so."""
    try:
        required_record(model)
    except CheckpointError as error:
        return str(error)
    return None


def _share_dims(graph: CouplingGraph, removed: _Removed) -> bool:
    """Whether inexact groups own dims together with others: a slice may go on to take the old part.

    Nothing that the model computes tells, as nothing masked equals a cut of such groups.
    """
    owners = Counter(place for group in graph.groups for place in _places(group))
    inexact = (graph[name] for name in removed if not graph[name].exact)
    return any(owners[place] > 1 for group in inexact for place in _places(group))


def _places(group: Group) -> set[ParameterDim]:
    return {(member.parameter, member.dim) for member in group.members}


def _run(copy: nn.Module, graph: CouplingGraph) -> list[Tensor]:
    """Run a model on meta, along the way that it was traced."""
    with as_under_export():
        return run_example(copy, graph)


def _judge(
    model: nn.Module, stage: _Stage, groups: Sequence[Group]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each group and what is to be changed of it."""
    for bundles in _sort_by_structure(model, groups).values():
        reason, multiple = _try(model, stage, bundles[0])
        for group in (group for bundle in bundles for group in bundle):
            if reason is None:
                yield group.name, {"multiple": multiple}
            else:
                yield group.name, {"prunable": False, "exact": False, "reason": reason}


def _sort_by_structure(
    model: nn.Module, groups: Sequence[Group]
) -> dict[Hashable, list[list[Group]]]:
    """Bundles of groups that are alike, in layers that are; one bundle stands for all of them."""
    alike: dict[Hashable, list[list[Group]]] = defaultdict(list)
    structures = _structures_around(model, groups)
    for bundle in _bundle(groups):
        first = bundle[0]
        alike[_key(first), structures.get(first.name, first.name)].append(bundle)
    return dict(alike)


def _try(model: nn.Module, stage: _Stage, bundle: Sequence[Group]) -> tuple[str | None, int]:
    """Why groups can't be cut in step, if so; the number that must divide the units that stay."""
    (first, *_), units = bundle, bundle[0].num_units
    reason = stage.find_fault(_smallest_cuts(model, bundle))
    if reason is None or first.kind not in _COUNTED:
        return reason, first.multiple
    for number in range(first.multiple + 1, units // 2 + 1):
        if units % number == 0:
            fewer = _smallest_cuts(model, [replace(first, multiple=number)])
            if fewer and stage.find_fault(fewer) is None:
                return None, number
    return reason, first.multiple


def _structures_around(model: nn.Module, groups: Sequence[Group]) -> dict[str, Hashable]:
    """Group → the structure of the layer that it lies in; none for groups outside of layers."""
    places = {g.name: place_in_stack(model, g.module) for g in groups if g.layer is not None}
    known: dict[str, Mapping[int, Hashable]] = {}
    structures = {}
    for name, place in places.items():
        if place is not None:
            path, index = place
            if path not in known:
                layers = model.get_submodule(path)
                assert isinstance(layers, nn.ModuleList)
                known[path] = layer_structures(layers)
            structures[name] = known[path][index]
    return structures


def _bundle(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that can only be cut in step; most are alone.

    Queries, keys, values and rotary tables of a layer have one width of heads.
    """
    bundles: dict[Hashable, list[Group]] = defaultdict(list)
    shared = any(group.kind == "head_dim" and group.layer is None for group in groups)
    for group in groups:
        layer = None if shared else group.layer
        bundles[("head_dim", layer) if group.kind == "head_dim" else group.name].append(group)
    return list(bundles.values())


def _smallest_cuts(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[int]]:
    """The fewest units that can go from each group, the last ones; groups without any left out."""
    multiples = find_needed_multiples(model, groups)
    removed = {}
    for bundle in _bundle(groups):
        fewest = min(group.num_units for group in bundle)
        multiple = math.lcm(*(multiples[group.name] for group in bundle))
        kept = (fewest - 1) // multiple * multiple
        if kept >= bundle[0].fewest and all(group.num_units % fewest == 0 for group in bundle):
            for group in bundle:
                first = kept * group.num_units // fewest
                removed[group.name] = list(range(first, group.num_units))
    return removed
