"""Whole steps that follow the shares of a policy, scaled until the cost is met.

What stays is multilinear in the units removed (a matrix cut on both sides loses a product), so the
scale is found by bisection on the exact cost. Then steps are rounded class by class of slots that
cost the same, the dearest first: each class makes up for what the rounding of the ones before it
left.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prunekit.allocation.budget import Budget, Steps

_BISECTIONS = 60  # halve the interval to below the resolution of a double
_LARGEST = 1e12  # a scale that no share needs: the search for an upper end stops there


def follow_shares(budget: Budget, limit: float) -> Steps:
    """Whole steps of all slots, in proportion to their shares, that come near to the limit."""
    classes: dict[float, list[str]] = defaultdict(list)
    for slot in budget.slots:
        classes[float(f"{budget.step_costs.get(slot.name, 0.0):.6g}")].append(slot.name)
    fixed: Steps = {}
    for cost in sorted(classes, reverse=True):
        steps = _scale_shares(budget, _find_scale(budget, limit, fixed), fixed)
        fixed |= _round_steps(budget, {name: steps[name] for name in classes[cost]})
    return fixed


def _find_scale(budget: Budget, limit: float, fixed: Steps) -> float:
    """The least scale of the shares at which the cost is within the limit."""

    def meets(scale: float) -> bool:
        return budget.cost_of(_scale_shares(budget, scale, fixed)) <= limit

    low, high = 0.0, 1.0
    while not meets(high) and high < _LARGEST:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def _scale_shares(budget: Budget, scale: float, fixed: Mapping[str, int]) -> dict[str, float]:
    """Fractional steps of all slots at a scale of the shares; slots in `fixed` keep theirs."""
    steps: dict[str, float] = {}
    for slot in budget.slots:
        units = min(scale * slot.share * slot.num_units, slot.removed[-1])
        low = max(i for i, gone in enumerate(slot.removed) if gone <= units)
        room = slot.removed[low + 1] - slot.removed[low] if low + 1 < len(slot.removed) else 1
        steps[slot.name] = fixed.get(slot.name, low + (units - slot.removed[low]) / room)
    return steps


def _round_steps(budget: Budget, steps: Mapping[str, float]) -> Steps:
    """Whole numbers with the same total, to the nearest one, by largest remainder."""
    whole = {name: math.floor(step + 1e-9) for name, step in steps.items()}
    missing = math.floor(sum(steps.values()) + 0.5) - sum(whole.values())
    movable = [name for name in steps if whole[name] < budget.last_steps[name]]
    by_remainder = sorted(movable, key=lambda name: whole[name] - steps[name])
    for name in by_remainder[: max(missing, 0)]:
        whole[name] += 1
    return whole
