"""The knapsack over prices of levels: a cut that a search begins with, and must beat."""

from __future__ import annotations

from collections.abc import Mapping

from prunekit.policies.knapsack import Point, spread_saving
from prunekit.search.arena import Arena, Parent
from prunekit.search.levels import Candidate, Space

Prices = Mapping[int, Mapping[int, float]]  # slot → step → KL, less that with the slot whole
PRICED = 4  # levels of each slot that are priced, spread evenly; between them prices are linear


def price_levels(arena: Arena, parent: Parent, batches: int) -> dict[int, dict[int, float]]:
    """The prices of some levels of every slot, where all other slots are as in the parent.

    There the levels are repaired for the inputs that they get; in the dense model they are not, and
    levels that depend on each other are priced far from where they are going to be.
    """
    space, own = arena.space, parent.candidate
    places = [
        (i, step)
        for i, levels in enumerate(space.levels)
        for step in sorted({0, own[i], *_pick(levels[1:])})
    ]
    children = [(*own[:i], step, *own[i + 1 :]) for i, step in places]
    values = arena.measure(children, batches, [parent] * len(children))
    found = dict(zip(places, values, strict=True))
    prices: dict[int, dict[int, float]] = {i: {} for i in range(len(own))}
    for (i, step), value in found.items():
        prices[i][step] = value - found[i, 0]
    return prices


def pack(space: Space, prices: Prices) -> Candidate:
    """The levels at which the sum of the prices is least at the limit: a knapsack."""
    budget = space.budget
    dense = budget.cost({})
    curves = {}
    for i, slot in enumerate(space.slots):
        curves[slot.name] = [
            Point(slot.removed[step], dense - budget.cost(slot.counts(slot.removed[step])), price)
            for step, price in sorted(prices[i].items())
        ]
    units = spread_saving(curves, dense - budget.limit)
    counts: dict[str, int] = {}
    for slot in space.slots:
        counts |= {name: round(count) for name, count in slot.counts(units[slot.name]).items()}
    return space.nearest(counts)


def _pick(levels: tuple[int, ...]) -> list[int]:
    """A few of the levels, the last one among them."""
    count = min(PRICED, len(levels))
    return [levels[(k + 1) * len(levels) // count - 1] for k in range(count)]
