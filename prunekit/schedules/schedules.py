"""Who is chosen when: all units at once from the dense model, or layer by layer on the already pruned prefix."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prunekit.compensation.apply import Compensation, Statistics
from prunekit.compensation.store import Store
from prunekit.compensation.walk import Layers, Site, Walk, consumers_of
from prunekit.console import say, track
from prunekit.errors import ConfigError, DataError
from prunekit.graph import CoupledGroup, CouplingGraph
from prunekit.importance.base import Batch, Importance, LayerImportance, ScoreImportance
from prunekit.plan import PruningPlan
from prunekit.policies import Budget, lowest
from prunekit.schedules.independent import scatter
from prunekit.schedules.state import State
from prunekit.surgery import masked


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a schedule works on; `protected` names the units of a group that must stay.

    `rounds`: score, remove a part, score again. `independent`: every matrix loses units of its own choice. `state`:
    keeps what is finished; `store`: where activations wait; `layers`: where layers' weights come from and, given the
    units removed so far, go to.
    """

    model: nn.Module
    graph: CouplingGraph
    groups: Sequence[CoupledGroup]
    budget: Budget
    batches: Sequence[Batch]
    importance: Importance
    compensation: Compensation | None
    rounds: int = 1
    protected: Mapping[str, list[int]] = field(default_factory=dict)
    independent: bool = False
    state: State | None = None
    store: Store | None = None
    layers: Callable[[Mapping[str, list[int]]], Layers] | None = None

    def remembered(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` gives, or gave before the run was broken off."""
        return self.state.remember(name, compute) if self.state and not self.independent else compute()


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Chooses the units, and leaves repaired consumers (their removed columns zero) where there is a compensation.

    `damping`: λ / mean(diag H) to start with; raised where the factorisation needs it.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.damping, str) or not 0 <= self.damping < math.inf:
            raise ConfigError(f"schedule.damping: expected a number ≥ 0, got {self.damping}")

    @abstractmethod
    def run(self, task: Task) -> PruningPlan:
        """The plan; the model's shapes are unchanged, its consumers may be repaired."""


@dataclass(frozen=True, kw_only=True)
class OneShot(Schedule):
    """Every unit is scored once on the dense model; the lowest go. A compensation follows layer by layer."""

    def run(self, task: Task) -> PruningPlan:
        """Score, choose, and repair where asked to."""
        if not isinstance(task.importance, ScoreImportance):
            name = type(task.importance).__name__.lower()
            raise ConfigError(f"importance={name} works layer by layer: use schedule=layerwise")
        importance = task.importance
        chosen = task.remembered("chosen", lambda: choose_by_score(task, importance))
        if task.compensation is not None:
            _repair(task, self.damping, chosen, {})
        return PruningPlan(chosen, task.graph.fingerprint)


@dataclass(frozen=True, kw_only=True)
class Layerwise(Schedule):
    """SlimGPT: each group on the inputs it gets from the pruned layers before it.

    Where groups compete, scores of the dense model say how many units each of them loses.
    """

    def run(self, task: Task) -> PruningPlan:
        """Choose and repair group by group; scores that need no moments are taken from the dense model first."""
        if isinstance(task.importance, LayerImportance):
            removed = _repair(task, self.damping, {}, task.remembered("counts", lambda: _counts(task)))
        else:
            assert isinstance(importance := task.importance, ScoreImportance)
            chosen = task.remembered("chosen", lambda: choose_by_score(task, importance))
            removed = _repair(task, self.damping, chosen, {})
        return PruningPlan(removed, task.graph.fingerprint)


def choose_by_score(task: Task, importance: ScoreImportance) -> dict[str, list[int]]:
    """Group → the units that go: the lowest scores, in `rounds` steps with the units already chosen masked."""
    removed: dict[str, list[int]] = {}
    for r in range(1, task.rounds + 1):
        with masked(task.model, task.graph, removed):
            structures = importance.structures(task.model, task.graph, task.groups, task.batches)
        scores = {g.name: importance.combine(g, structures[g.name]) for g in task.groups}
        for name, values in scores.items():
            if values.isnan().any():
                raise DataError(f"{name}: its scores hold NaN")
            values[removed.get(name, [])] = -math.inf
            values[task.protected.get(name, [])] = math.inf
        counts = task.budget.solve(scores, r / task.rounds)
        removed = lowest(task.groups, scores, counts)
        if task.rounds > 1:
            say(f"round {r} of {task.rounds}: {sum(counts.values())} units")
    if task.independent:
        if task.compensation is not None:
            raise ConfigError("groups=independent: nothing can be repaired when units don't belong together: "
                              "expected compensation=none")  # fmt: skip
        scatter(task.model, task.graph, structures, removed)
    return removed


def _counts(task: Task) -> dict[str, int]:
    """How many units each group loses where they are chosen layer by layer."""
    if task.rounds > 1 or task.independent:
        option = "groups=independent" if task.independent else f"scope.rounds={task.rounds}"
        name = type(task.importance).__name__.lower()
        raise ConfigError(f"{option}: importance={name} chooses layer by layer; use schedule=oneshot")
    if task.budget.ranking == "local":
        return task.budget.solve()
    if not isinstance(task.importance, ScoreImportance):
        raise ConfigError("scope.ranking: expected an importance that scores, for groups to compete")
    return task.budget.solve(task.importance.score(task.model, task.graph, task.groups, task.batches))


def _repair(
    task: Task, damping: float, chosen: Mapping[str, Sequence[int]], counts: Mapping[str, int]
) -> dict[str, list[int]]:
    """Walk the groups: choose `counts` units where nothing is chosen, repair the consumers; all the units removed."""
    removed = {name: list(units) for name, units in chosen.items()}
    groups = [group for group in task.groups if counts.get(group.name) or removed.get(group.name)]
    targets = {group.name: task.compensation.target_of(group.kind) for group in groups} if task.compensation else {}
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
    task: Task,
    damping: float,
    group: CoupledGroup,
    sites: Sequence[Site],
    units: list[int] | None,
    counts: Mapping[str, int],
) -> list[int]:
    """Choose a group's units where none are given, repair its consumers; the units."""
    repairs = task.compensation
    found = [Statistics(site=s, damping=damping, centred=bool(repairs and repairs.centred(s))) for s in sites]
    weights = [statistics.weight() for statistics in found]
    if any(statistics.share for statistics in found):
        say(f"{group.name}: {', '.join(f'{s.share:.0%}' for s in found)} of the way to its target")
    if units is None:
        assert isinstance(task.importance, LayerImportance)
        problems = [statistics.problem(weight) for statistics, weight in zip(found, weights, strict=True)]
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
