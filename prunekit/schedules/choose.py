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


def choose_by_score(assignment: Assignment, importance: ScoreImportance) -> dict[str, list[int]]:
    """Group → the units that go: the lowest scores, in `rounds` steps with the units already chosen
    masked.
    """
    removed: dict[str, list[int]] = {}
    for r in range(1, assignment.rounds + 1):
        with masked(assignment.model, assignment.graph, removed):
            structures = importance.structures(
                assignment.model, assignment.graph, assignment.groups, assignment.batches
            )
        scores = {g.name: importance.combine(g, structures[g.name]) for g in assignment.groups}
        for name, values in scores.items():
            if values.isnan().any():
                raise DataError(f"{name}: its scores hold NaN")
            values[removed.get(name, [])] = -math.inf
            values[assignment.protected.get(name, [])] = math.inf
        counts = assignment.budget.solve(scores, r / assignment.rounds)
        removed = lowest(assignment.groups, scores, counts)
        if assignment.rounds > 1:
            say(f"round {r} of {assignment.rounds}: {sum(counts.values())} units")
    if assignment.independent:
        if assignment.compensation is not None:
            raise ConfigError(
                "groups=independent: nothing can be repaired when units don't belong together: "
                "expected compensation=none"
            )
        scatter(assignment.model, assignment.graph, structures, removed)
    return removed
