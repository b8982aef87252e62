"""Seeds: what the search begins with, and what its winner must beat."""

from __future__ import annotations

from collections.abc import Mapping

from prunekit.policies.knapsack import Point, spread_saving
from prunekit.search.arena import Arena
from prunekit.search.levels import Candidate, Space

Prices = Mapping[int, Mapping[int, float]]  # slot → step → KL(dense ‖ model with it alone)
_PRICED = 4  # levels of each slot that are priced, spread evenly; between them prices are linear


def price_levels(arena: Arena, batches: int) -> dict[int, dict[int, float]]:
    """The price of some levels of every slot: the KL of replacing the slot alone."""
    space, dense = arena.space, (0,) * len(arena.space.slots)
    places = [(i, step) for i, levels in enumerate(space.levels) for step in _pick(levels[1:])]
    alone = [(*dense[:i], step, *dense[i + 1 :]) for i, step in places]
    prices: dict[int, dict[int, float]] = {i: {0: 0.0} for i in range(len(dense))}
    for (i, step), price in zip(places, arena.measure(alone, batches), strict=True):
        prices[i][step] = price
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
    count = min(_PRICED, len(levels))
    return [levels[(k + 1) * len(levels) // count - 1] for k in range(count)]
