"""Levels: the few steps of each slot that the search tries, and what a candidate costs.

A candidate gives every slot one of its steps. Its levels are steps of the slot itself, so that they
are what the scope, the shapes and the model allow (`prunekit.allocation.slots`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from prunekit.allocation.budget import Budget
from prunekit.allocation.slots import Slot

Candidate = tuple[int, ...]  # the step of each slot, in the order of the budget's slots


@dataclass(frozen=True, kw_only=True)
class Space:
    """The candidates of a round.

    Args:
        budget: the slots, the cost and its limit.
        levels: for each slot, the steps that candidates may give it; rising from 0.
    """

    budget: Budget
    levels: tuple[tuple[int, ...], ...]

    @property
    def slots(self) -> Sequence[Slot]:
        """The slots, in the order of a candidate's steps."""
        return self.budget.slots

    @cached_property
    def tolerance(self) -> float:
        """Half of what a level of the cheapest slot saves: how near costs come to the limit."""
        dense = (0,) * len(self.slots)
        savings = []
        for i, levels in enumerate(self.levels):
            saved = self.cost(dense) - self.cost(_with(dense, i, levels[-1]))
            if saved > 0:
                savings.append(saved / (len(levels) - 1))
        return min(savings, default=0.0) / 2

    def cost(self, candidate: Candidate) -> float:
        """What the model costs at these steps."""
        return self.budget.cost_of(self.steps(candidate))

    def steps(self, candidate: Candidate) -> dict[str, int]:
        """Slot → its step."""
        return {slot.name: step for slot, step in zip(self.slots, candidate, strict=True)}

    def counts(self, candidate: Candidate) -> dict[str, int]:
        """Group → how many units it loses."""
        counts = self.budget.counts(self.steps(candidate))
        return {name: round(count) for name, count in counts.items()}

    def counts_by_group(self) -> dict[str, list[int]]:
        """Group → how many units it loses at each level of its slot."""
        return {
            name: [round(factor * slot.removed[step]) for step in levels]
            for slot, levels in zip(self.slots, self.levels, strict=True)
            for name, factor in slot.factors.items()
        }

    def move(self, candidate: Candidate, slot: int, levels: int) -> Candidate | None:
        """The candidate with one slot so many levels higher; None where there is no such level."""
        own = self.levels[slot]
        place = own.index(candidate[slot]) + levels
        return _with(candidate, slot, own[place]) if 0 <= place < len(own) else None

    def nearest(self, counts: Mapping[str, int]) -> Candidate:
        """The candidate whose levels come nearest to these numbers of units that groups lose."""
        steps = []
        for slot, levels in zip(self.slots, self.levels, strict=True):
            units = counts.get(slot.name, 0) / slot.factors[slot.name]
            steps.append(min(levels, key=lambda step: abs(slot.removed[step] - units)))
        return tuple(steps)


def spread_levels(
    slot: Slot, step: float, centre: int | None = None, reach: float = 1.0
) -> tuple[int, ...]:
    """The steps of a slot nearest to the multiples of a share of its units.

    Args:
        slot: the slot.
        step: the share of the slot's units between two levels.
        centre: a step that is a level too.
        reach: how far from the centre levels may be, as a share of the units; no level is further
            away but the first, at which nothing is removed.
    """
    total = slot.num_units
    wanted = [step * total * i for i in range(int(1 / step + 1e-9) + 1)]
    levels = {nearest_step(slot, units) for units in wanted}
    if centre is not None:
        middle = slot.removed[centre]
        levels = {s for s in levels if abs(slot.removed[s] - middle) <= reach * total + 1e-9}
        levels.add(centre)
    return tuple(sorted(levels | {0}))


def nearest_step(slot: Slot, units: float) -> int:
    """The step of a slot that removes about so many units; the lower one of two."""
    place = bisect_left(slot.removed, units)
    near = range(max(place - 1, 0), min(place + 1, len(slot.removed)))
    return min(near, key=lambda step: abs(slot.removed[step] - units))


def _with(candidate: Candidate, slot: int, step: int) -> Candidate:
    return (*candidate[:slot], step, *candidate[slot + 1 :])
