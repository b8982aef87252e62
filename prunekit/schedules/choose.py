"""Choose units by their scores, as many as the budget asks for, at once or in rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from prunekit.allocation.budget import pick_lowest
from prunekit.errors import ConfigError, DataError
from prunekit.importance.base import ScoreImportance
from prunekit.runtime.console import say
from prunekit.schedules.base import Assignment
from prunekit.schedules.independent import scatter
from prunekit.surgery.masking import masked


def choose_by_score(assignment: Assignment, importance: ScoreImportance) -> dict[str, list[int]]:
    """Choose the units with the lowest scores; group name → the units that go.

    In each of the assignment's rounds the model is scored with the units chosen so far masked, and
    a part of the units is chosen that grows in equal steps. With `independent` every matrix
    loses other units, and its slices are moved (`scatter`).

    Raises:
        ConfigError: matrices with units of their own under a compensation.
        DataError: a score is NaN.
    """
    if assignment.independent and assignment.compensation is not None:
        raise ConfigError(
            "groups=independent: expected compensation=none: where every matrix loses other units, "
            "no consumer can be repaired"
        )
    removed: dict[str, list[int]] = {}
    for r in range(1, assignment.rounds + 1):
        with masked(assignment.model, assignment.graph, removed):
            structures = importance.structures(
                assignment.model, assignment.graph, assignment.groups, assignment.batches
            )
        scores = combine_scores(assignment, importance, structures, removed)
        counts = assignment.budget.solve(scores, r / assignment.rounds)
        removed = pick_lowest(assignment.groups, scores, counts)
        if assignment.rounds > 1:
            say(f"round {r} of {assignment.rounds}: {sum(counts.values())} units")
    if assignment.independent:
        scatter(assignment.model, assignment.graph, structures, removed)
    return removed


def combine_scores(
    assignment: Assignment,
    importance: ScoreImportance,
    structures: Mapping[str, Tensor],
    removed: Mapping[str, list[int]],
) -> dict[str, Tensor]:
    """Combine scores of structures to scores of units: group name → float64 [num_units].

    Units that are `removed` already score lowest, units that are protected highest.
    """
    scores = {}
    for group in assignment.groups:
        values = importance.combine(group, structures[group.name])
        if values.isnan().any():
            raise DataError(f"{group.name}: its scores hold NaN")
        values[removed.get(group.name, [])] = -math.inf
        values[assignment.protected.get(group.name, [])] = math.inf
        scores[group.name] = values
    return scores
