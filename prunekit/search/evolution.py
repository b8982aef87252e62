"""Evolution: children that move a few levels of a candidate, judged on more and more tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from prunekit.report.parts import SearchPoint
from prunekit.search.arena import Arena, Parent
from prunekit.search.levels import Candidate, Space

_MOVES = (1, 1, 1, 2, 2, 3)  # how many slots a child moves before its cost is made to fit
_SIZES = (1, 1, 2)  # by how many levels each
_TRIES = 20  # children that are known already, one after another, before no more are made


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of each generation's selection: judged on so many batches, so many survive."""

    batches: int
    survivors: int


def mutate(space: Space, parent: Candidate, rng: random.Random) -> Candidate:
    """Move a few slots by a level or two; then others, until the cost fits the limit again."""
    child, moved = parent, set[int]()
    for _ in range(rng.choice(_MOVES)):
        slot = rng.randrange(len(child))
        after = space.move(child, slot, rng.choice((-1, 1)) * rng.choice(_SIZES))
        if after is not None and slot not in moved:
            child = after
            moved.add(slot)
    child = _approach(space, child, moved, rng)
    # Where the other slots are too coarse, or at their ends, the moved ones give way.
    return fit(space, child, set(), rng)


def fit(space: Space, candidate: Candidate, fixed: set[int], rng: random.Random) -> Candidate:
    """Move slots that are not fixed until the cost is as near to the limit as they can bring it.

    Where no single move helps, a slot that overshoots is moved, and others make up for it.
    """
    candidate = _approach(space, candidate, fixed, rng)
    if _miss(space, candidate) <= space.tolerance:
        return candidate
    free = [slot for slot in range(len(candidate)) if slot not in fixed]
    for slot in rng.sample(free, len(free)):
        for levels in (1, -1):
            if (moved := space.move(candidate, slot, levels)) is not None:
                trial = _approach(space, moved, fixed | {slot}, rng)
                candidate = min(candidate, trial, key=lambda c: _miss(space, c))
        if _miss(space, candidate) <= space.tolerance:
            break
    return candidate


def _miss(space: Space, candidate: Candidate) -> float:
    """How far the cost is from the limit."""
    return abs(space.cost(candidate) - space.budget.limit)


def _approach(space: Space, candidate: Candidate, fixed: set[int], rng: random.Random) -> Candidate:
    """Move slots that are not fixed, in random order, while the cost comes nearer to the limit."""
    error = space.cost(candidate) - space.budget.limit
    free = [slot for slot in range(len(candidate)) if slot not in fixed]
    while abs(error) > space.tolerance and free:
        place = rng.randrange(len(free))
        after = space.move(candidate, free[place], 1 if error > 0 else -1)
        later = error if after is None else space.cost(after) - space.budget.limit
        if after is not None and abs(later) < abs(error):
            candidate, error = after, later
            free = [slot for slot in range(len(candidate)) if slot not in fixed]
        else:
            free.pop(place)
    return candidate


def evolve(
    arena: Arena,
    start: Parent,
    stages: Sequence[Stage],
    children: int,
    generations: int,
    rng: random.Random,
) -> tuple[Candidate, list[SearchPoint]]:
    """The best candidate after all generations, and the best KL after each of them."""
    parents = [start]
    last = stages[-1]
    scores = {start.candidate: arena.measure_at_limit([start.candidate], last.batches)[0]}
    curve = []
    for _ in range(generations):
        origins = _breed(arena, parents, children, rng)
        for stage in stages:
            born = list(origins)
            values = arena.measure_at_limit(born, stage.batches, list(origins.values()))
            kept = sorted(range(len(born)), key=lambda i: values[i])[: stage.survivors]
            origins = {born[i]: origins[born[i]] for i in kept}
        born = list(origins)
        values = arena.measure_at_limit(born, last.batches, list(origins.values()))
        scores |= dict(zip(born, values, strict=True))
        best = sorted(scores, key=lambda c: scores[c])[: last.survivors]
        scores = {candidate: scores[candidate] for candidate in best}
        before = {parent.candidate: parent for parent in parents}
        parents = [before.get(c) or arena.raise_parent(c, origins[c]) for c in best]
        curve.append(SearchPoint(evaluations=arena.evaluations, divergence=min(scores.values())))
    return parents[0].candidate, curve


def _breed(
    arena: Arena, parents: Sequence[Parent], children: int, rng: random.Random
) -> dict[Candidate, Parent]:
    """New children, each with its parent; fewer where most are known already."""
    born: dict[Candidate, Parent] = {}
    for _ in range(children):
        parent = parents[rng.randrange(len(parents))]
        for _ in range(_TRIES):
            child = mutate(arena.space, parent.candidate, rng)
            if child not in born and not arena.knows(child):
                born[child] = parent
                break
    return born
