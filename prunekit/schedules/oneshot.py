"""All units are scored at once on the dense model."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.errors import ConfigError
from prunekit.importance.base import ScoreImportance
from prunekit.plan import PruningPlan
from prunekit.schedules.base import Assignment, Schedule
from prunekit.schedules.choose import choose_by_score
from prunekit.schedules.repair import _repair


@dataclass(frozen=True, kw_only=True)
class OneShot(Schedule):
    """Every unit is scored once on the dense model; the lowest go. A compensation follows layer by
    layer.
    """

    def run(self, task: Assignment) -> PruningPlan:
        """Score, choose, and repair where asked to."""
        if not isinstance(task.importance, ScoreImportance):
            name = type(task.importance).__name__.lower()
            raise ConfigError(f"importance={name} works layer by layer: use schedule=layerwise")
        importance = task.importance
        chosen = task.remembered("chosen", lambda: choose_by_score(task, importance))
        if task.compensation is not None:
            _repair(task, self.damping, chosen, {})
        return PruningPlan(chosen, task.graph.fingerprint)
