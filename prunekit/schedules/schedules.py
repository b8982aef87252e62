"""Who is chosen when: all units at once from the dense model, or layer by layer on the already pruned prefix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.compensation.apply import Compensation
from prunekit.compensation.solver import invert
from prunekit.console import say
from prunekit.errors import ConfigError
from prunekit.graph import CoupledGroup, CouplingGraph
from prunekit.importance.base import Batch, Importance, LayerImportance, ScoreImportance
from prunekit.plan import PruningPlan
from prunekit.schedules.walk import walk


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a schedule works on: `counts` says how many units leave each group."""

    model: nn.Module
    graph: CouplingGraph
    counts: Mapping[str, int]
    batches: Sequence[Batch]
    importance: Importance
    compensation: Compensation | None

    @property
    def groups(self) -> list[CoupledGroup]:
        """The groups that lose units, in execution order."""
        return [group for group in self.graph.groups if self.counts.get(group.name, 0) > 0]


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Chooses the units, and leaves repaired consumers (their removed columns zero) where there is a compensation.

    `damping`: λ / mean(diag H) to start with; raised where the factorisation needs it.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.damping, str) or not self.damping >= 0:
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
        plan = choose_lowest(task, task.importance)
        if task.compensation is not None:
            _repair(task, self.damping, plan.removed)
        return plan


@dataclass(frozen=True, kw_only=True)
class Layerwise(Schedule):
    """SlimGPT: each group on the inputs it gets from the pruned layers before it."""

    def run(self, task: Task) -> PruningPlan:
        """Choose and repair group by group; scores that need no moments are taken from the dense model first."""
        if isinstance(task.importance, ScoreImportance):
            chosen = choose_lowest(task, task.importance).removed
        else:
            chosen = {}
        return PruningPlan(_repair(task, self.damping, chosen), task.graph.fingerprint)


def choose_lowest(task: Task, importance: ScoreImportance) -> PruningPlan:
    """The units with the lowest scores of each group; ties go to the lower index."""
    groups = task.groups
    scores = importance.score(task.model, task.graph, groups, task.batches)
    removed = {g.name: scores[g.name].argsort(stable=True)[: task.counts[g.name]].tolist() for g in groups}
    return PruningPlan(removed, task.graph.fingerprint)


def _repair(task: Task, damping: float, chosen: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Walk the groups: choose where nothing is chosen yet, repair the consumer; all the units removed."""
    removed = {name: list(units) for name, units in chosen.items()}
    for group, consumer, moments in walk(task.model, task.groups, task.batches):
        inverse = invert(moments.hessian, damping)
        weight = consumer.weight()
        index = consumer.member.index.to(weight.device)
        if group.name not in removed:
            assert isinstance(task.importance, LayerImportance)
            alive = weight.masked_fill(inverse.dead, 0)  # a dead input costs nothing
            removed[group.name] = task.importance.choose(alive, inverse.matrix, index, task.counts[group.name])
        columns = index[torch.tensor(removed[group.name])].flatten()
        consumer.store(_cut(weight, inverse.matrix, columns, task.compensation))
        say(f"{group.name}: {group.num_units} → {group.num_units - len(removed[group.name])} units")
    return removed


def _cut(weight: Tensor, inverse: Tensor, columns: Tensor, compensation: Compensation | None) -> Tensor:
    if compensation is not None:
        return compensation.repair(weight, inverse, columns)
    return weight.index_fill(1, columns, 0)
