"""Move single steps while that brings the cost nearer to the limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.allocation.budget import Budget, Steps

# An error must fall by more than rounding to count as fallen: otherwise steps could move for ever.
_FALLEN = 1 - 1e-9


def polish(budget: Budget, steps: Steps, limit: float) -> Steps:
    """Move single steps; where no move helps, move a dear one and let cheap ones make up for it.

    The result is within half the cheapest step of the limit, unless the slots have no such steps.
    """
    costs = budget.step_costs
    steps, error = _move_steps(budget, steps, limit, costs)
    for name in sorted(costs, key=lambda n: costs[n]):
        for move in (-1, 1):
            inside = 0 <= steps[name] + move <= budget.last_steps[name]
            if error > min(costs.values()) / 2 and inside:
                moved = {**steps, name: steps[name] + move}
                # The cheaper ones first, as far as they go: another dear one would only move back.
                cheaper = [n for n in costs if costs[n] < costs[name] * _FALLEN]
                trial, _ = _move_steps(budget, moved, limit, cheaper)
                trial, trial_error = _move_steps(budget, trial, limit, costs)
                if trial_error < error * _FALLEN:
                    steps, error = trial, trial_error
    return steps


def _move_steps(
    budget: Budget, steps: Steps, limit: float, slots: Iterable[str]
) -> tuple[Steps, float]:
    """Move single steps of these slots to and fro, of the cheapest first, until none helps.

    Returns:
        the steps, and how far their cost is from the limit.
    """
    costs = budget.step_costs
    names = sorted(slots, key=lambda name: (costs[name], -steps[name]))
    error = abs(budget.cost_of(steps) - limit)
    improved = True
    while improved:
        improved = False
        for name in names:
            # A step that is worth more than twice the error would only overshoot.
            helps = error > costs[name] / 2 * _FALLEN
            for move in (1, -1) if helps else ():
                trial = {**steps, name: steps[name] + move}
                if 0 <= trial[name] <= budget.last_steps[name]:
                    trial_error = abs(budget.cost_of(trial) - limit)
                    if trial_error < error * _FALLEN:
                        steps, error, improved = trial, trial_error, True
    return steps, error
