"""Choose units by their scores under the budget, at once or in rounds."""

from __future__ import annotations

import math

from prunekit.allocation.budget import lowest
from prunekit.errors import ConfigError, DataError
from prunekit.importance.base import ScoreImportance
from prunekit.runtime.console import say
from prunekit.schedules.base import Assignment
from prunekit.schedules.independent import scatter
from prunekit.surgery.masking import masked


def choose_by_score(task: Assignment, importance: ScoreImportance) -> dict[str, list[int]]:
    """Group → the units that go: the lowest scores, in `rounds` steps with the units already chosen
    masked.
    """
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
            raise ConfigError(
                "groups=independent: nothing can be repaired when units don't belong together: "
                "expected compensation=none"
            )
        scatter(task.model, task.graph, structures, removed)
    return removed
