"""Cut groups in execution order: choose units where none are chosen yet, repair the consumers."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

import torch

from prunekit.allocation.budget import pick_lowest
from prunekit.calibration.activations import InputSums
from prunekit.calibration.consumers import find_consumers
from prunekit.calibration.observe import Site
from prunekit.calibration.statistics import SiteWork, invert_moments, prepare_site
from prunekit.calibration.walk import Walk
from prunekit.calibration.weighting import EQUAL
from prunekit.compensation.base import Compensation
from prunekit.errors import DataError
from prunekit.graph import Group
from prunekit.importance.base import Importance, Sight
from prunekit.runtime.console import say, track
from prunekit.schedules.base import Assignment
from prunekit.schedules.state import Finished


def cut_groups(
    assignment: Assignment,
    damping: float,
    *,
    chosen: Mapping[str, Sequence[int]] | None = None,
    counts: Mapping[str, int] | None = None,
) -> dict[str, list[int]]:
    """Cut the groups in execution order; group name → the units removed.

    The units are `chosen` already, or each group loses `counts` units that the importance chooses
    from the moments of the consumers' inputs, or by scores of the model as it is then. Groups that
    an earlier run has finished get their weights back from the state.
    """
    removed = {name: list(units) for name, units in (chosen or {}).items()}
    counts = counts or {}
    groups = [g for g in assignment.groups if counts.get(g.name) or removed.get(g.name)]
    chooser = assignment.importance if chosen is None else None
    walk = walk_through(assignment, groups, chooser)
    for group, sites in track(walk, "pruning layer by layer", len(groups)):
        if assignment.snapshot is not None:
            assignment.snapshot.keep([group])
        if sites:
            units = removed.get(group.name)
            count = counts.get(group.name, 0)
            removed[group.name] = cut_group(assignment, damping, group, sites, units, count)
        else:
            removed[group.name] = restore_group(assignment, group)
        if assignment.layers is not None:
            assignment.layers.remove(group, removed[group.name])
        left = group.num_units - len(removed[group.name])
        say(f"{group.name}: {group.num_units} → {left} units")
    return removed


def walk_through(
    assignment: Assignment,
    groups: Sequence[Group],
    chooser: Importance | None,
    done: Container[str] = (),
) -> Walk:
    """The walk that shows these groups with the moments of their consumers' inputs.

    The `chooser` chooses units by them; None: all are chosen. Nothing is measured where the state
    has finished a group; without a state, where it is `done`.
    """
    compensation, targets = assignment.compensation, {}
    for group in groups if compensation else ():
        assert compensation is not None
        if (target := compensation.target_of(group.kind)) != "pruned":
            targets[group.name] = target
    choosing = None if chooser is None else chooser.weighting
    return Walk(
        model=assignment.model,
        groups=groups,
        batches=assignment.batches,
        targets=targets,
        around=assignment.graph.groups,
        done=assignment.state.finished if assignment.state else done,
        store=assignment.store,
        layers=assignment.layers,
        weighting=(choosing or EQUAL) if compensation is None else compensation.weighting,
        choosing=choosing,
        outputs="equal" if chooser is None else chooser.output_weights,
    )


def restore_group(assignment: Assignment, group: Group) -> list[int]:
    """Give the consumers of a finished group their weights; return the units removed from it."""
    assert assignment.state is not None
    finished = assignment.state.restore(group.name, find_consumers(assignment.model, group))
    _note_float64(assignment, group, finished.float64)
    return finished.removed


def _note_float64(assignment: Assignment, group: Group, count: int) -> None:
    if count:
        assignment.float64[group.name] = count


def cut_group(
    assignment: Assignment,
    damping: float,
    group: Group,
    sites: Sequence[Site],
    units: list[int] | None,
    count: int,
) -> list[int]:
    """Remove units of a group, and return them.

    Where `units` is None, `count` of them are chosen here. Afterwards the columns of the removed
    units are zero in all consumers of the group, and the other columns are repaired.
    """
    compensation = assignment.compensation
    inputs = sum_inputs(sites) if units is None else {}
    work = prepare_sites(group, sites, compensation, damping, choosing=units is None)
    if units is None:
        units = choose_group(assignment, group, work, inputs, count)
    for part in work:
        repair_site(part, compensation, units)
    in_float64 = sum(part.statistics.took_float64 for part in work)
    _note_float64(assignment, group, in_float64)
    if assignment.state:
        finished = Finished(removed=units, float64=in_float64)
        assignment.state.record(group.name, finished, find_consumers(assignment.model, group))
    return units


def choose_group(
    assignment: Assignment,
    group: Group,
    work: Sequence[SiteWork],
    inputs: Mapping[str, InputSums],
    count: int,
) -> list[int]:
    """Choose `count` units of a group by what is known of it now."""
    problems = [part.pose_problem() for part in work]
    importance = assignment.importance
    if importance.by_layer is not None:
        return importance.by_layer.choose(problems, count)
    assert importance.at_once is not None
    sight = Sight(
        model=assignment.model,
        graph=assignment.graph,
        group=group,
        batches=assignment.batches,
        inputs=inputs,
        problems=problems,
    )
    scores = importance.at_once.rescore(sight)
    if scores.isnan().any():
        raise DataError(f"{group.name}: its scores hold NaN")
    scores[assignment.protected.get(group.name, [])] = torch.inf
    return pick_lowest([group], {group.name: scores}, {group.name: count})[group.name]


def sum_inputs(sites: Sequence[Site]) -> dict[str, InputSums]:
    """Name of a consumer's weight → the sums of its inputs; stacked experts are left out."""
    return {
        consumer.member.parameter: sums
        for site in sites
        for sums in [site.sum_inputs()]
        for consumer in site.consumers
        if consumer.expert is None
    }


def prepare_sites(
    group: Group,
    sites: Sequence[Site],
    compensation: Compensation | None,
    damping: float,
    *,
    choosing: bool,
) -> list[SiteWork]:
    """Prepare all sites of a group; `choosing` says whether its units have yet to be chosen."""
    repairs = compensation is not None and compensation.needs_inverse
    work = []
    for site in sites:
        centred = compensation is not None and compensation.centred(site)
        own = choosing and site.choosing is None
        part = prepare_site(site, damping, centred=centred, inverted=repairs or own)
        if site.choosing is not None:
            part = replace(part, choosing=invert_moments(site.choosing, damping, centred=centred))
        work.append(part)
    if any(part.share for part in work):
        shares = ", ".join(f"{part.share:.0%}" for part in work)
        say(f"{group.name}: {shares} of the way to its target")
    # Choosing needs room for more matrices [n, n]. Sites may share their moments (experts that saw
    # few tokens), so that Hessians are dropped only when all sites are inverted.
    for site, part in zip(sites, work, strict=True):
        if part.statistics.inverse is not None:
            site.moments.drop()
        site.choosing = None
    return work


def repair_site(work: SiteWork, compensation: Compensation | None, units: Sequence[int]) -> None:
    """Zero the columns of the units in all consumers of a site, and repair the other columns.

    A consumer whose parameter has another use as well keeps its other columns.
    """
    site, weight = work.site, work.weight
    columns = site.consumers[0].member.index[torch.tensor(units)].flatten().to(weight.device)
    masked, bias = weight.index_fill(1, columns, 0), None
    if compensation is None or not any(consumer.is_repairable for consumer in site.consumers):
        repaired = masked
    else:
        repaired, bias = compensation.repair(weight, work.statistics, columns)
    rows = [consumer.outputs for consumer in site.consumers]
    biases = [None] * len(rows) if bias is None else bias.split(rows)
    parts = zip(site.consumers, repaired.split(rows), masked.split(rows), biases, strict=True)
    for consumer, part, plain, own in parts:
        if consumer.is_repairable:
            consumer.store(part, own)
        else:
            consumer.store(plain)
