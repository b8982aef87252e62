"""Where the candidates of one database are judged; nothing is judged twice.

Several processes share the candidates: each judges its part, and all learn all results.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prunekit.runtime.processes import gather_all, own_part
from prunekit.search.database import Database
from prunekit.search.fitness import Divergence, Judge, States, subtract
from prunekit.search.levels import Candidate, Space
from prunekit.search.shelf import Shelf


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A candidate, and its hidden states before every layer, which its children start from."""

    candidate: Candidate
    states: States


@dataclass(kw_only=True)
class Arena:
    """Judges candidates.

    Args:
        space: the candidates.
        database: what the groups hold at their levels.
        judge: compares the model with the dense one.
        shelf: keeps what was judged, for a run that is broken off.

    Attributes:
        tokens: that went through the whole model so far, in all processes; half of it counts half.
    """

    space: Space
    database: Database
    judge: Judge
    shelf: Shelf = field(default_factory=Shelf)
    tokens: float = 0.0
    _known: dict[Candidate, list[Divergence]] = field(default_factory=dict)
    _calls: int = 0

    @property
    def evaluations(self) -> int:
        """How many candidates were judged so far, on any number of batches."""
        return len(self._known)

    def knows(self, candidate: Candidate) -> bool:
        """Whether a candidate was judged already."""
        return candidate in self._known

    def measure(
        self, candidates: Sequence[Candidate], batches: int, parents: Sequence[Parent] = ()
    ) -> list[float]:
        """KL(dense ‖ candidate) of each candidate on the first batches.

        `parents`: for each candidate, or none at all, one that it is run from. Batches on which a
        candidate was judged before are not run again.
        """
        missing = {
            candidate: i
            for i, candidate in enumerate(candidates)
            if len(self._known.get(candidate, ())) < batches
        }
        if missing:
            self._calls += 1
            judge = partial(self._judge_missing, missing, batches, parents)
            content = self.shelf.remember(f"judged-{self._calls}", judge)
            self.tokens += content["tokens"]
            for candidate, judged in content["judged"]:
                divergences = [Divergence.from_json(part) for part in judged]
                self._known.setdefault(tuple(candidate), []).extend(divergences)
        return [self._total(c, batches).mean for c in candidates]

    def _judge_missing(
        self, missing: Mapping[Candidate, int], batches: int, parents: Sequence[Parent]
    ) -> dict[str, Any]:
        """Judge candidates on the batches that they were not judged on yet, as JSON.

        `missing`: candidate → its place among the candidates that have these `parents`.
        """
        before, own = self.judge.tokens_run, []
        for candidate in own_part(list(missing)):
            parent = parents[missing[candidate]] if parents else None
            done = len(self._known.get(candidate, ()))
            divergences = self._run(candidate, range(done, batches), parent)
            own.append((candidate, [divergence.to_json() for divergence in divergences]))
        parts = gather_all((own, self.judge.tokens_run - before))
        return {
            "judged": [entry for entries, _ in parts for entry in entries],
            "tokens": sum(tokens for _, tokens in parts),
        }

    def compare(
        self, candidates: Sequence[Candidate], parent: Parent, batches: int
    ) -> list[tuple[float, float]]:
        """By how much each candidate's KL is above its parent's, and the standard error of that.

        Both are of the differences of the samples in the first batches; one sample tells no error.
        """
        self.measure([parent.candidate], batches)
        self.measure(candidates, batches, [parent] * len(candidates))
        own = self._total(parent.candidate, batches)
        changes = [subtract(self._total(c, batches), own) for c in candidates]
        return [(change, error if math.isfinite(error) else 0.0) for change, error in changes]

    def measure_at_limit(
        self, candidates: Sequence[Candidate], batches: int, parents: Sequence[Parent] = ()
    ) -> list[float]:
        """As `measure`, brought to the cost of the limit: a candidate that saves less is no better.

        The KL is taken to rise with the square of what is saved, which is exact for small cuts.
        """
        budget = self.space.budget
        dense = budget.cost({})
        values = []
        for candidate, value in zip(
            candidates, self.measure(candidates, batches, parents), strict=True
        ):
            saved = dense - self.space.cost(candidate)
            scale = ((dense - budget.limit) / saved) ** 2 if saved > 0 else 1.0
            values.append(value * scale)
        return values

    def find_others(self, known: Collection[Candidate], batches: int) -> list[Candidate]:
        """Candidates at the limit but for these, judged on so many batches; the best first."""
        limit, tolerance = self.space.budget.limit, self.space.tolerance
        others = [
            other
            for other, judged in self._known.items()
            if len(judged) >= batches
            and other not in known
            and abs(self.space.cost(other) - limit) <= tolerance
        ]
        values = self.measure_at_limit(others, batches)
        return [others[i] for i in sorted(range(len(others)), key=values.__getitem__)]

    def raise_parent(self, candidate: Candidate, parent: Parent | None = None) -> Parent:
        """Keep the hidden states of a candidate, run from another one's, for its children."""
        self.database.place(self.space.counts(candidate))
        first = self._first_changed(candidate, parent)
        before = self.judge.tokens_run
        states = self.judge.trail(first, parent.states if parent else self.judge.states)
        self.tokens += self.judge.tokens_run - before
        return Parent(candidate=candidate, states=states)

    def _total(self, candidate: Candidate, batches: int) -> Divergence:
        """What is known of a candidate on the first batches."""
        return sum(self._known[candidate][:batches], Divergence.none())

    def _run(
        self, candidate: Candidate, batches: Sequence[int], parent: Parent | None
    ) -> list[Divergence]:
        self.database.place(self.space.counts(candidate))
        first = self._first_changed(candidate, parent)
        states = parent.states if parent else self.judge.states
        return [self.judge.measure(b, first, states) for b in batches]

    def _first_changed(self, candidate: Candidate, parent: Parent | None) -> int:
        """The first layer in which a candidate is not its parent, or not dense."""
        before = parent.candidate if parent else (0,) * len(candidate)
        layers = [
            min(group.layer or 0 for group in slot.groups)
            for slot, old, new in zip(self.space.slots, before, candidate, strict=True)
            if old != new
        ]
        return min(layers, default=self.judge.layers - 1)
