"""A round: a database of levels around the best cut so far, guided steps, then evolution."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.report.parts import SearchPoint, SearchRound
from prunekit.report.plain import from_plain, to_plain
from prunekit.runtime.console import say
from prunekit.search.arena import Arena
from prunekit.search.bench import Bench, Checked
from prunekit.search.evolution import Stage, evolve, fit
from prunekit.search.fitness import Divergence
from prunekit.search.guide import climb
from prunekit.search.seeds import pack, price_levels
from prunekit.search.shelf import Shelf


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much a round does; `Search` says what each number means."""

    sweeps: int
    generations: int
    children: int
    prices: int
    stages: Sequence[Stage]


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a round.

    Attributes:
        winner: the best candidate but for those that the round began with, cut as an ordinary run
            would; or the knapsack of a later round, where that is better so.
        packed: the knapsack seed, cut so; None where it was not asked for, and in later rounds.
        prices: slot → the KL of replacing it alone by its level in the best cut so far; none where
            more rounds follow.
        figures: what the round did.
    """

    winner: Checked
    packed: Checked | None
    prices: dict[str, float]
    figures: SearchRound

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "winner": self.winner.to_json(),
            "packed": self.packed and self.packed.to_json(),
            "prices": self.prices,
            "figures": to_plain(self.figures),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """What `to_json` wrote."""
        return cls(
            winner=Checked.from_json(content["winner"]),
            packed=Checked.from_json(content["packed"]) if content["packed"] else None,
            prices=dict(content["prices"]),
            figures=from_plain(SearchRound, content["figures"], "search"),
        )


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a round begins with.

    Attributes:
        centre: group → units removed, in the cut that the database is built around.
        others: more cuts to begin with.
        step: the share of a group's units between two levels.
        reach: how far from the centre levels may be, as a share of a group's units.
        packs: a knapsack is made of this round's levels.
        first: it is a seed.
        to_beat: KL of the centre on held-out samples; None in the first round.
        last: no round follows, even where this one helps.
    """

    centre: Mapping[str, int]
    others: Sequence[Mapping[str, int]]
    step: float
    reach: float
    packs: bool
    first: bool = True
    to_beat: Divergence | None = None
    last: bool = True

    def helps(self, winner: Checked) -> bool:
        """Whether held-out samples confirm that a cut is better than the centre."""
        return self.to_beat is None or winner.held_out.mean < self.to_beat.mean


def run_round(
    bench: Bench, start: Start, effort: Effort, rng: random.Random, shelf: Shelf | None = None
) -> Result:
    """Build the database, climb from the best start, and cut the winner exactly.

    Where guided steps find nothing better, evolution tries.

    `shelf`: keeps what the round has finished.
    """
    shelf = shelf or Shelf()
    arena = bench.open_round(start.centre, start.step, start.reach, shelf)
    space, few, many = arena.space, effort.stages[0].batches, effort.stages[-1].batches
    starts = [bench.steps_of(start.centre)]
    starts += [fit(space, space.nearest(counts), set(), rng) for counts in start.others]
    centre, packed, prices = None, None, None
    if start.packs:
        centre = arena.raise_parent(starts[0])
        prices = price_levels(arena, centre, few, effort.prices)
        packed = fit(space, pack(space, prices), set(), rng)
        starts.append(packed)
    values = arena.measure_at_limit(starts, many)
    best = starts[values.index(min(values))]
    parent = centre if centre and best == starts[0] else arena.raise_parent(best)
    parent, curve = climb(arena, parent, (few, many), effort.sweeps, rng, prices)
    generations = effort.generations if parent.candidate in starts else 0
    winner, more = evolve(arena, parent, effort.stages, effort.children, generations, rng)
    curve += more
    if begun := winner in starts:
        # Levels fit the centre, which has an advantage here; cut exactly, others may be better.
        winner = next(iter(arena.find_others(starts, many)), winner)
    named = {"winner": winner}
    # A winner that was found on the way from the knapsack has been compared with it already.
    if packed is not None and (start.first or begun or best != packed):
        named["packed"] = packed
    cuts = {name: _check(bench, shelf, name, space.counts(c)) for name, c in named.items()}
    seed = cuts.pop("packed", None) if start.first else None
    lowest = min(cuts.values(), key=lambda cut: cut.fitness)
    alone = _price_alone(arena, start, lowest, few)
    _tell(curve)
    figures = SearchRound(
        step=start.step,
        database_bytes=bench.database.nbytes,
        evaluations=arena.evaluations,
        tokens=round(arena.tokens),
        curve=tuple(curve),
    )
    return Result(winner=lowest, packed=seed, prices=alone, figures=figures)


def _check(bench: Bench, shelf: Shelf, name: str, counts: Mapping[str, int]) -> Checked:
    """A cut of the model, at the limit, exactly; found again where the shelf holds it."""
    content = shelf.remember(name, lambda: bench.check(bench.settle(counts)).to_json())
    return Checked.from_json(content)


def _price_alone(arena: Arena, start: Start, winner: Checked, batches: int) -> dict[str, float]:
    """Slot → the KL of the dense model with the slot alone at its level in the best cut.

    None while more rounds follow.
    """
    helps = start.helps(winner)
    if helps and not start.last:
        return {}
    taken = arena.space.nearest(winner.counts if helps else start.centre)
    dense = (0,) * len(taken)
    cut = [i for i, step in enumerate(taken) if step]
    alone = [(*dense[:i], taken[i], *dense[i + 1 :]) for i in cut]
    prices = dict(zip(cut, arena.measure(alone, batches), strict=True))
    return {slot.name: prices.get(i, 0.0) for i, slot in enumerate(arena.space.slots)}


def _tell(curve: Sequence[SearchPoint]) -> None:
    """Say what a round came to."""
    first, last = curve[0], curve[-1]
    say(
        f"{last.evaluations} candidates judged: KL to the dense model {first.divergence:.4f} → "
        f"{last.divergence:.4f}"
    )
