"""Guided steps: every slot is moved by one level alone, then the best moves are made together.

Evaluations tell what the moves that look best change in KL and in cost. The moves that win most KL
for the cost that they give back are made, and the cheapest moves that save as much cost. How many
of them are right at once is tried: their prices add up only nearby.

Few tokens tell prices badly, and the best of many noisy prices are too good to be true. So a price
is taken to be worse than measured by its standard error over the samples.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunekit.report.parts import SearchPoint
from prunekit.search.arena import Arena, Parent
from prunekit.search.evolution import fit
from prunekit.search.levels import Candidate, Space
from prunekit.search.seeds import Prices, price_between

_PART = 3  # one of so many moves of either kind is priced on many batches,
_LEAST = 8  # and at least so many
_ERRORS = 1.0  # standard errors by which a price is taken to be worse than measured
TOGETHER = (1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90)  # how many moves back are tried at once


@dataclass(frozen=True, kw_only=True)
class Move:
    """One slot by one level.

    Attributes:
        slot: the slot.
        levels: 1 where more goes, −1 where some comes back.
        price: the KL that is paid for a saved unit of cost, or won by giving it back; at the worse
            end of what the samples leave open.
    """

    slot: int
    levels: int
    price: float


def climb(
    arena: Arena,
    parent: Parent,
    batches: tuple[int, int],
    sweeps: int,
    rng: random.Random,
    prices: Prices | None = None,
) -> tuple[Parent, list[SearchPoint]]:
    """Take guided steps while they help, at most `sweeps` of them.

    `batches`: few, and many. `prices`: of levels, where they are known (`probe`).
    """
    best = arena.measure_at_limit([parent.candidate], batches[1])[0]
    curve = [SearchPoint(evaluations=arena.evaluations, divergence=best)]
    for _ in range(sweeps):
        moves = probe(arena, parent, batches, prices)
        children = combine(arena.space, parent.candidate, moves, rng)
        values = arena.measure_at_limit(children, batches[1], [parent] * len(children))
        curve.append(SearchPoint(evaluations=arena.evaluations, divergence=min([best, *values])))
        if not values or min(values) >= best:
            break
        best = min(values)
        parent = arena.raise_parent(children[values.index(best)], parent)
    return parent, curve


def probe(
    arena: Arena, parent: Parent, batches: tuple[int, int], prices: Prices | None = None
) -> list[Move]:
    """Moves of slots by one level, with their prices at the parent on many batches.

    All are guessed from the prices of levels, or without them priced on few batches first, at the
    better end of what these leave open; the better part of those that give back, and of those that
    save, is priced on many.
    """
    space, own = arena.space, parent.candidate
    cost = space.cost(own)
    moved = {
        (slot, levels): space.move(own, slot, levels)
        for slot in range(len(own))
        for levels in (-1, 1)
    }
    known = {
        place: after
        for place, after in moved.items()
        if after is not None and space.cost(after) != cost
    }
    few, many = batches
    if few < many or prices:
        if prices:
            moves = _guess(space, parent, known, prices)
        else:
            moves = _price(arena, parent, known, few, -_ERRORS)
        sides = (_sort_back(moves), _sort_saving(moves))
        hopeful = [move for side in sides for move in side[: count_hopeful(len(side))]]
        known = {(move.slot, move.levels): known[move.slot, move.levels] for move in hopeful}
    return _price(arena, parent, known, many, _ERRORS)


def count_hopeful(moves: int) -> int:
    """How many of the moves of either kind are priced on many batches, at most."""
    return max(-(-moves // _PART), _LEAST)


def _guess(
    space: Space, parent: Parent, moved: Mapping[tuple[int, int], Candidate], prices: Prices
) -> list[Move]:
    """The moves to these candidates, at prices between those of levels; none beyond them."""
    own, moves = parent.candidate, []
    cost = space.cost(own)
    for (i, levels), after in moved.items():
        before, then = (price_between(space.slots[i], prices[i], c[i]) for c in (own, after))
        if before is not None and then is not None:
            price = (then - before) / (cost - space.cost(after))
            moves.append(Move(slot=i, levels=levels, price=price))
    return moves


def _price(
    arena: Arena,
    parent: Parent,
    moved: Mapping[tuple[int, int], Candidate],
    batches: int,
    errors: float,
) -> list[Move]:
    """The moves to these candidates; their prices are worse by so many standard errors."""
    cost = arena.space.cost(parent.candidate)
    changes = arena.compare(list(moved.values()), parent, batches)
    return [
        Move(
            slot=slot,
            levels=levels,
            price=(change + errors * error) / (cost - arena.space.cost(after)),
        )
        for ((slot, levels), after), (change, error) in zip(moved.items(), changes, strict=True)
    ]


def _sort_back(moves: Sequence[Move]) -> list[Move]:
    """The moves that give units back, those that win most first."""
    return sorted((m for m in moves if m.levels < 0), key=lambda m: -m.price)


def _sort_saving(moves: Sequence[Move]) -> list[Move]:
    """The moves that save, the cheapest first."""
    return sorted((m for m in moves if m.levels > 0), key=lambda m: m.price)


def combine(
    space: Space, own: Candidate, moves: Sequence[Move], rng: random.Random
) -> list[Candidate]:
    """Children that make 1, 2, 3, 5 … of the best moves back, while these promise to win.

    A slot moves once. Moves that save cost are taken while they are cheaper than the move back.
    """
    back, saving = _sort_back(moves), _sort_saving(moves)
    child, used, made = own, set[int](), 0
    children: list[Candidate] = []
    for move in back:
        if move.slot in used:
            continue
        cheaper = [
            m for m in saving if m.slot not in used and m.slot != move.slot and m.price < move.price
        ]
        if not cheaper:
            break
        child = _make(space, child, move, used)
        for other in cheaper:
            if space.cost(child) - space.budget.limit <= space.tolerance:
                break
            child = _make(space, child, other, used)
        made += 1
        if made in TOGETHER:
            children.append(fit(space, child, used, rng))
    if made:
        children.append(fit(space, child, used, rng))
    return [c for c in dict.fromkeys(children) if c != own]


def _make(space: Space, child: Candidate, move: Move, used: set[int]) -> Candidate:
    """Make a move, and note that its slot is used."""
    used.add(move.slot)
    after = space.move(child, move.slot, move.levels)
    assert after is not None
    return after
