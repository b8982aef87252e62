"""Walk the groups in execution order, choose units where nothing is chosen yet, repair the
consumers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from prunekit.calibration.consumers import consumers_of
from prunekit.calibration.observe import Site
from prunekit.calibration.statistics import Statistics
from prunekit.calibration.walk import Walk
from prunekit.graph import Group
from prunekit.importance.base import LayerImportance
from prunekit.runtime.console import say, track
from prunekit.schedules.base import Assignment


def _repair(
    task: Assignment, damping: float, chosen: Mapping[str, Sequence[int]], counts: Mapping[str, int]
) -> dict[str, list[int]]:
    """Walk the groups: choose `counts` units where nothing is chosen, repair the consumers; all the
    units removed.
    """
    removed = {name: list(units) for name, units in chosen.items()}
    groups = [group for group in task.groups if counts.get(group.name) or removed.get(group.name)]
    targets = (
        {group.name: task.compensation.target_of(group.kind) for group in groups}
        if task.compensation
        else {}
    )
    walk = Walk(
        model=task.model,
        groups=groups,
        batches=task.batches,
        targets={name: target for name, target in targets.items() if target != "pruned"},
        done=task.state.finished if task.state else (),
        store=task.store,
        layers=task.layers(removed) if task.layers else None,
    )
    for group, sites in track(walk, "pruning layer by layer", len(groups)):
        consumers = consumers_of(task.model, group)
        if not sites:
            assert task.state is not None
            removed[group.name] = task.state.restore(group.name, consumers)
        else:
            removed[group.name] = _cut(task, damping, group, sites, removed.get(group.name), counts)
            if task.state:
                task.state.record(group.name, removed[group.name], consumers)
        say(f"{group.name}: {group.num_units} → {group.num_units - len(removed[group.name])} units")
    return removed


def _cut(
    task: Assignment,
    damping: float,
    group: Group,
    sites: Sequence[Site],
    units: list[int] | None,
    counts: Mapping[str, int],
) -> list[int]:
    """Choose a group's units where none are given, repair its consumers; the units."""
    repairs = task.compensation
    found = [
        Statistics(site=s, damping=damping, centred=bool(repairs and repairs.centred(s)))
        for s in sites
    ]
    weights = [statistics.weight() for statistics in found]
    if any(statistics.share for statistics in found):
        say(f"{group.name}: {', '.join(f'{s.share:.0%}' for s in found)} of the way to its target")
    if units is None:
        assert isinstance(task.importance, LayerImportance)
        problems = [
            statistics.problem(weight) for statistics, weight in zip(found, weights, strict=True)
        ]
        for site in sites:
            site.moments.drop()
        units = task.importance.choose(problems, counts[group.name])
    for site, statistics, weight in zip(sites, found, weights, strict=True):
        columns = site.consumers[0].member.index[torch.tensor(units)].flatten().to(weight.device)
        bias = None
        if repairs is None:
            repaired = weight.index_fill(1, columns, 0)
        else:
            repaired, bias = repairs.repair(weight, statistics, columns)
        rows = [consumer.outputs for consumer in site.consumers]
        biases = [None] * len(rows) if bias is None else bias.split(rows)
        for consumer, part, own in zip(site.consumers, repaired.split(rows), biases, strict=True):
            consumer.store(part, own)
    return units
