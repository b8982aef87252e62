"""The schedule of LLM-Pruner: all units are scored at once on the dense model."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit.errors import ConfigError
from prunekit.plan import PruningPlan
from prunekit.schedules.base import Assignment, Schedule
from prunekit.schedules.choose import choose_by_score
from prunekit.schedules.repair import cut_groups


@dataclass(frozen=True, kw_only=True)
class OneShot(Schedule):
    """Every unit is scored on the dense model, and the lowest go.

    Where there is a compensation, the consumers are repaired layer by layer afterwards.
    """

    def run(self, assignment: Assignment) -> PruningPlan:
        """Score, choose, and repair where a compensation is given.

        Raises:
            ConfigError: an importance that gives no scores.
        """
        importance = assignment.importance.at_once
        if importance is None:
            name = assignment.importance.name
            raise ConfigError(f"importance={name} works layer by layer: use schedule=layerwise")
        chosen = choose_by_score(assignment, importance)
        if assignment.compensation is not None:
            cut_groups(assignment, self.damping, chosen=chosen)
        return PruningPlan(chosen, assignment.graph.fingerprint)
