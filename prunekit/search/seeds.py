"""The knapsack over prices of levels: a cut that a search begins with, and must beat."""

from __future__ import annotations

from collections.abc import Mapping

from prunekit.allocation.slots import Slot
from prunekit.policies.knapsack import Point, spread_saving
from prunekit.search.arena import Arena, Parent
from prunekit.search.levels import Candidate, Space

Prices = Mapping[int, Mapping[int, float]]  # slot → step → KL, less that with the slot as it is

_FAR = 1.5  # levels between two that tell that they are no neighbours, whatever was rounded


def price_levels(
    arena: Arena, parent: Parent, batches: int, parts: int
) -> dict[int, dict[int, float]]:
    """The prices of some levels of every slot, where all other slots are as in the parent.

    They are the slot's own level, and those that divide its levels into so many equal parts;
    between them prices are linear. There the levels are repaired for the inputs that they get; in
    the dense model they are not, and levels that depend on each other are priced far from where
    they are going to be.
    """
    space, own = arena.space, parent.candidate
    places = [
        (i, step)
        for i, levels in enumerate(space.levels)
        for step in pick_levels(space.slots[i], levels, parts)
        if step != own[i]
    ]
    children = [(*own[:i], step, *own[i + 1 :]) for i, step in places]
    before, *values = arena.measure([own, *children], batches, [parent] * (len(children) + 1))
    prices: dict[int, dict[int, float]] = {i: {step: 0.0} for i, step in enumerate(own)}
    for (i, step), value in zip(places, values, strict=True):
        prices[i][step] = value - before
    return prices


def pack(space: Space, prices: Prices) -> Candidate:
    """The levels at which the sum of the prices is least near the limit: a knapsack."""
    budget = space.budget
    dense = budget.cost({})
    curves, lowest, target = {}, {}, dense - budget.limit
    for i, slot in enumerate(space.slots):
        points = [
            Point(slot.removed[step], dense - budget.cost(slot.counts(slot.removed[step])), price)
            for step, price in sorted(prices[i].items())
        ]
        first = lowest[slot.name] = points[0]
        target -= first.saving
        curves[slot.name] = [
            Point(point.ratio - first.ratio, point.saving - first.saving, point.error)
            for point in points
        ]
    more = spread_saving(curves, target)
    counts: dict[str, int] = {}
    for slot in space.slots:
        units = lowest[slot.name].ratio + more[slot.name]
        counts |= {name: round(count) for name, count in slot.counts(units).items()}
    return _settle(space, space.nearest(counts), prices)


def _settle(space: Space, candidate: Candidate, prices: Prices) -> Candidate:
    """Move the levels to the limit by the moves that cost least KL, or give back most."""
    error = space.cost(candidate) - space.budget.limit
    while abs(error) > space.tolerance:
        moves = []
        for i, slot in enumerate(space.slots):
            after = space.move(candidate, i, 1 if error > 0 else -1)
            if after is None:
                continue
            saved = space.cost(candidate) - space.cost(after)
            before, then = (price_between(slot, prices[i], c[i]) for c in (candidate, after))
            if before is not None and then is not None and abs(error - saved) < abs(error):
                moves.append(((then - before) / saved, after))
        if not moves:
            break
        choose = min if error > 0 else max
        candidate = choose(moves, key=lambda move: move[0])[1]
        error = space.cost(candidate) - space.budget.limit
    return candidate


def price_between(slot: Slot, prices: Mapping[int, float], step: int) -> float | None:
    """The price of a step by a line between those beside it; None beyond them."""
    below = max((s for s in prices if s <= step), default=None)
    above = min((s for s in prices if s >= step), default=None)
    if below is None or above is None:
        return None
    if below == above:
        return prices[below]
    low, high = slot.removed[below], slot.removed[above]
    part = (slot.removed[step] - low) / (high - low)
    return prices[below] + part * (prices[above] - prices[below])


def pick_levels(slot: Slot, levels: tuple[int, ...], parts: int) -> list[int]:
    """The levels that divide all of them into so many parts, with the lowest and the highest one.

    The level 0 is not among them where the next one is more than a level away.
    """
    removed = [slot.removed[step] for step in levels]
    if len(levels) > 2 and removed[1] - removed[0] > _FAR * (removed[2] - removed[1]):
        levels = levels[1:]
    last = len(levels) - 1
    return sorted({levels[last * part // parts] for part in range(parts + 1)})
