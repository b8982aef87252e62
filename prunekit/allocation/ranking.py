"""Steps where groups compete: first the step with the least score for the cost that it saves."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from prunekit.allocation.slots import Slot

if TYPE_CHECKING:
    from prunekit.allocation.budget import Budget, Steps


@dataclass(frozen=True, order=True)
class _Step:
    """One step of a slot in the queue of all of them; ordered by `density`, then by place."""

    density: float
    slot: int
    at: int


def rank_slots(
    budget: Budget,
    slots: Sequence[Slot],
    scores: Mapping[str, Tensor],
    limit: float,
    fixed: Steps,
) -> Steps:
    """Steps of these slots, the least score per cost saved first; other slots stay at `fixed`.

    The queue is taken up to the last step before the limit is met. From there on a step that would
    overshoot by more than half the cheapest step ends its slot, and what still fits is taken.
    """
    steps = {**fixed, **{slot.name: 0 for slot in slots}}
    queue = sorted(
        _Step(density, i, at)
        for i, slot in enumerate(slots)
        for at, density in enumerate(_densities(budget, slot, scores), 1)
    )

    def meets(length: int) -> bool:
        return budget.cost_of(_take(queue[:length], slots, steps)) <= limit

    # The cost falls along the queue, so that `meets` is False, …, False, True, …, True.
    sure = max(bisect_left(range(len(queue) + 1), True, key=meets) - 1, 0)
    steps = _take(queue[:sure], slots, steps)
    left, ended = budget.cost_of(steps), set[str]()
    slack = min(budget.step_costs[slot.name] for slot in slots) / 2
    for step in queue[sure:]:
        if left - limit <= slack or len(ended) == len(slots):
            break
        name = slots[step.slot].name
        if name in ended:
            continue
        after = budget.cost_of({**steps, name: step.at})
        if after >= limit - slack:
            steps[name], left = step.at, after
        else:
            ended.add(name)
    return steps


def rank_in_layers(
    budget: Budget, slots: Sequence[Slot], scores: Mapping[str, Tensor], steps: Steps
) -> Steps:
    """Rank the slots of each layer together, until the layer costs what `steps` let it cost."""
    layers: dict[int | None, list[Slot]] = defaultdict(list)
    for slot in slots:
        layers[slot.groups[0].layer].append(slot)
    for inside in layers.values():
        limit = budget.cost_of(steps)
        names = {slot.name for slot in inside}
        others = {name: at for name, at in steps.items() if name not in names}
        steps = rank_slots(budget, inside, scores, limit, others)
    return steps


def _densities(budget: Budget, slot: Slot, scores: Mapping[str, Tensor]) -> list[float]:
    """For each step of a slot, the score of its units over the cost that it saves; never falling.

    Where scores of groups are comparable as they are, it is the score per unit instead.
    """
    densities: list[float] = []
    ranked = {group.name: scores[group.name].sort().values for group in slot.groups}
    last = slot.removed[-1] - slot.removed[-2]
    worth = 1.0 if budget.comparable else budget.step_costs[slot.name] / last
    for before, after in zip(slot.removed, slot.removed[1:], strict=False):
        total = sum(
            float(ranked[name][factor * before : factor * after].sum())
            for name, factor in slot.factors.items()
        )
        lowest = densities[-1] if densities else -math.inf
        densities.append(max(total / (worth * (after - before)), lowest))
    return densities


def _take(queue: Sequence[_Step], slots: Sequence[Slot], steps: Steps) -> Steps:
    """The steps after the entries of a queue, in which each slot's steps are in order."""
    return {**steps, **{slots[step.slot].name: step.at for step in queue}}
