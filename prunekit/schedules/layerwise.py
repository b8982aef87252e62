"""SlimGPT: layer by layer, each on the inputs it gets from the pruned layers before it."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.errors import ConfigError
from prunekit.importance.base import LayerImportance, ScoreImportance
from prunekit.plan import PruningPlan
from prunekit.schedules.base import Assignment, Schedule
from prunekit.schedules.choose import choose_by_score
from prunekit.schedules.repair import _repair


@dataclass(frozen=True, kw_only=True)
class Layerwise(Schedule):
    """SlimGPT: each group on the inputs it gets from the pruned layers before it.

    Where groups compete, scores of the dense model say how many units each of them loses.
    """

    def run(self, task: Assignment) -> PruningPlan:
        """Choose and repair group by group; scores that need no moments are taken from the dense
        model first.
        """
        if isinstance(task.importance, LayerImportance):
            removed = _repair(
                task, self.damping, {}, task.remembered("counts", lambda: _counts(task))
            )
        else:
            assert isinstance(importance := task.importance, ScoreImportance)
            chosen = task.remembered("chosen", lambda: choose_by_score(task, importance))
            removed = _repair(task, self.damping, chosen, {})
        return PruningPlan(removed, task.graph.fingerprint)


def _counts(task: Assignment) -> dict[str, int]:
    """How many units each group loses where they are chosen layer by layer."""
    if task.rounds > 1 or task.independent:
        option = "groups=independent" if task.independent else f"scope.rounds={task.rounds}"
        name = type(task.importance).__name__.lower()
        raise ConfigError(
            f"{option}: importance={name} chooses layer by layer; use schedule=oneshot"
        )
    if task.budget.ranking == "local":
        return task.budget.solve()
    if not isinstance(task.importance, ScoreImportance):
        raise ConfigError(
            "scope.ranking: expected an importance that scores, for groups to compete"
        )
    return task.budget.solve(
        task.importance.score(task.model, task.graph, task.groups, task.batches)
    )
