"""Choose units by their scores, as many as the budget asks for, at once or in rounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit.allocation.budget import pick_lowest
from prunekit.allocation.costs.smooth import SmoothCost
from prunekit.errors import ConfigError, DataError
from prunekit.gates import Bounds, Factors, cut_factors, fold, merge, pack, unpack
from prunekit.importance.base import ScoreImportance
from prunekit.runtime.console import say
from prunekit.schedules.base import Assignment
from prunekit.schedules.independent import scatter
from prunekit.surgery.masking import masked

_UPDATES = "gates-updates/weights"  # in the state, the updates of weights that were learned


def choose_by_score(assignment: Assignment, importance: ScoreImportance) -> dict[str, list[int]]:
    """Choose the units with the lowest scores; group name → the units that go.

    Where units that stay have learned a factor, it goes into their consumers' weights; not under a
    compensation, which computes these weights anew. What weights have learned is added to them.

    Raises:
        ConfigError: matrices with units of their own, or trained ones, under a compensation.
        DataError: a score is NaN.
    """
    if assignment.independent and assignment.compensation is not None:
        raise ConfigError(
            "groups=independent: expected compensation=none: where every matrix loses other units, "
            "no consumer can be repaired"
        )
    if importance.changes_weights and assignment.compensation is not None:
        raise ConfigError(
            f"importance={importance.name}: expected compensation=none where weights are trained "
            "beside the gates (importance.train.rank, .all_weights): a repair would lead them back"
        )
    updates: dict[str, Tensor] = {}
    state = None if assignment.independent else assignment.state

    def compute() -> dict[str, Any]:
        content = _choose(assignment, importance, updates)
        if state is not None and updates:
            state.save_tensors(_UPDATES, updates)
        return content

    chosen = assignment.remember("chosen", compute)
    if state is not None and not updates and state.has_tensors(_UPDATES):
        updates = state.load_tensors(_UPDATES)
    removed: dict[str, list[int]] = chosen["removed"]
    repaired = assignment.compensation is not None
    scales = {
        name: torch.tensor(factors, dtype=torch.float64)
        for name, factors in ({} if repaired else chosen["scales"]).items()
    }
    deltas = unpack(updates)
    _change_weights(assignment, scales, deltas)
    if importance.kept_rank:
        model, graph = assignment.model, assignment.graph
        assignment.adapters.update(cut_factors(model, graph, deltas, removed, scales))
    return removed


def _change_weights(
    assignment: Assignment, scales: Mapping[str, Tensor], deltas: Mapping[str, Factors]
) -> None:
    """Add the updates of weights, then fold the factors of units."""
    groups = [group for group in assignment.groups if group.name in scales]
    if assignment.snapshot is not None:
        assignment.snapshot.keep(groups)
        assignment.snapshot.keep_parameters(deltas)
    merge(assignment.model, deltas)
    for group in groups:
        fold(assignment.model, assignment.graph, group, scales[group.name])


def _choose(
    assignment: Assignment, importance: ScoreImportance, updates: dict[str, Tensor]
) -> dict[str, Any]:
    """The units that go, and the factors of all units, as JSON; `updates` takes those of weights.

    In each of the assignment's rounds the model is scored with the units chosen so far masked, and
    a part of the units is chosen that grows in equal steps. With `independent` every matrix
    loses other units, and its slices are moved (`scatter`).
    """
    removed: dict[str, list[int]] = {}
    for r in range(1, assignment.rounds + 1):
        with masked(assignment.model, assignment.graph, removed):
            measured = importance.measure(
                assignment.model,
                assignment.graph,
                assignment.groups,
                assignment.batches,
                _set_bounds(assignment, removed, r),
            )
        scores = combine_scores(assignment, importance, measured.structures, removed)
        counts = assignment.budget.solve(scores, r / assignment.rounds)
        removed = pick_lowest(assignment.groups, scores, counts)
        if assignment.rounds > 1:
            say(f"round {r} of {assignment.rounds}: {sum(counts.values())} units")
    if assignment.independent:
        scatter(assignment.model, assignment.graph, measured.structures, removed)
    updates |= pack(measured.updates)
    scales = {name: factors.tolist() for name, factors in measured.scales.items()}
    return {"removed": removed, "scales": scales}


def _set_bounds(assignment: Assignment, removed: Mapping[str, list[int]], number: int) -> Bounds:
    """What the choice of a round must keep to, given the units that are gone already."""
    budget, pinned = assignment.budget, dict[str, dict[int, float]]()
    for group in assignment.groups:
        pinned[group.name] = dict.fromkeys(removed.get(group.name, ()), -math.inf)
        pinned[group.name] |= dict.fromkeys(assignment.protected.get(group.name, ()), math.inf)

    def solve(scores: Mapping[str, Tensor], progress: float) -> dict[str, int]:
        return budget.solve(scores, (number - 1 + progress) / assignment.rounds)

    share, names = None, [group.name for group in assignment.groups]
    if budget.ranking == "model":
        share = SmoothCost(budget.cost, names, next(assignment.model.parameters()).device)
    dense = budget.cost({})
    part = number / assignment.rounds
    return Bounds(
        solve=solve,
        competing=budget.ranking != "local",
        prices=budget.prices,
        pinned=pinned,
        share=share,
        target=1 - part * (1 - budget.limit / dense),
        name=f"gates-{number}",
        keeper=None if assignment.independent else assignment.state,
    )


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
