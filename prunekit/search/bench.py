"""The bench: a model, its levels and its judges, which all rounds of one search work with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from prunekit.allocation.budget import Budget
from prunekit.allocation.polish import polish
from prunekit.allocation.slots import make_slots
from prunekit.errors import ConfigError
from prunekit.policies.base import Setting
from prunekit.runtime.console import say
from prunekit.runtime.modes import evaluating
from prunekit.schedules.base import Assignment
from prunekit.schedules.choose import combine_scores
from prunekit.search.arena import Arena
from prunekit.search.build import Builder
from prunekit.search.database import Database
from prunekit.search.fitness import Divergence, Judge
from prunekit.search.halves import judges_in_halves
from prunekit.search.levels import Candidate, Space, nearest_step, spread_levels
from prunekit.search.samples import Samples
from prunekit.search.shelf import Shelf

# Times the model's weights, in the same dtype, that a database may take; else its levels reach less
# far.
LARGEST = 1.5


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A cut of the model as an ordinary run would make it on the samples of the database.

    Attributes:
        counts: group → how many units it loses.
        fitness: KL(dense ‖ cut model) on the samples that children are judged on.
        held_out: the same on held-out samples.
    """

    counts: dict[str, int]
    fitness: float
    held_out: Divergence

    def to_json(self) -> dict[str, Any]:
        """The check as a JSON object."""
        held_out = self.held_out.to_json()
        return {"counts": self.counts, "fitness": self.fitness, "held_out": held_out}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Checked:
        """What `to_json` wrote."""
        held_out = Divergence.from_json(content["held_out"])
        return cls(counts=dict(content["counts"]), fitness=content["fitness"], held_out=held_out)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rounds of a search work with.

    Attributes:
        setting: what the policy looks at.
        budget: the slots of all groups, the cost and its limit.
        builder: makes levels as the run's schedule would.
        database: the levels of the present round.
        judge: judges on the samples of the fitness.
        checker: judges on held-out samples.
        checked: the cuts that were checked, by their counts.
    """

    setting: Setting
    budget: Budget
    builder: Builder
    database: Database
    judge: Judge
    checker: Judge
    checked: dict[tuple[tuple[str, int], ...], Checked] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(cls, setting: Setting, samples: Samples, batches: int) -> Iterator[Bench]:
        """A bench for a `with` block; afterwards the model is as it was.

        `batches`: on how many batches of the fitness candidates are judged at most. Only cuts that
        are checked are judged on all of them.
        """
        model, groups = setting.model, setting.groups
        budget = make_budget(setting, dict.fromkeys((g.name for g in groups), 1.0))
        store = setting.tools.open_store("search")
        database = Database(model, groups, store, halves=judges_in_halves(model))
        try:
            with evaluating(model):
                yield cls(
                    setting=setting,
                    budget=budget,
                    builder=make_builder(setting, budget, samples),
                    database=database,
                    judge=Judge(model, groups, samples.fitness, store, batches),
                    checker=Judge(model, groups, samples.held_out, store, 0),
                )
        finally:
            database.close()
            store.close()

    def check(self, counts: Mapping[str, int]) -> Checked:
        """Cut the model by these counts, as an ordinary run would, and judge it; undo the cut.

        The same cut is not made twice.
        """
        key = tuple(sorted((name, count) for name, count in counts.items() if count))
        if key not in self.checked:
            self.checked[key] = self._check(counts)
        return self.checked[key]

    def _check(self, counts: Mapping[str, int]) -> Checked:
        self.database.place({})
        self.builder.cut(self.database, counts)
        fitness = [self.judge.measure(b) for b in range(len(self.judge.batches))]
        held_out = [self.checker.measure(b) for b in range(len(self.checker.batches))]
        self.database.reset_all()
        return Checked(
            counts=dict(counts),
            fitness=sum(fitness, Divergence.none()).mean,
            held_out=sum(held_out, Divergence.none()),
        )

    def open_round(
        self, counts: Mapping[str, int], step: float, reach: float, shelf: Shelf | None = None
    ) -> Arena:
        """Fill the database with levels around these counts; the arena of its candidates.

        `shelf`: keeps what the round has finished.
        """
        shelf = shelf or Shelf()
        centres = self.steps_of(counts)
        space = self.plan_levels(counts, step, reach)
        self.builder.fill(self.database, space.counts_by_group(), space.counts(centres), shelf)
        return Arena(space=space, database=self.database, judge=self.judge, shelf=shelf)

    def plan_levels(self, counts: Mapping[str, int], step: float, reach: float) -> Space:
        """The candidates of a round around these counts; levels reach as far as bytes allow."""
        centres = self.steps_of(counts)
        space = self._make_space(centres, step, reach)
        while reach > step and not self._fits(space):
            reach = min(reach, 1.0) - step / 2
            space = self._make_space(centres, step, reach)
            say(
                f"all levels would take more than {LARGEST:g} times the weights: they reach "
                f"{reach:.0%} of a group's units from the best cut"
            )
        return space

    def _make_space(self, centres: Candidate, step: float, reach: float) -> Space:
        """The candidates with levels around these steps of the slots."""
        levels = tuple(
            spread_levels(slot, step, centre, reach)
            for slot, centre in zip(self.budget.slots, centres, strict=True)
        )
        return Space(budget=self.budget, levels=levels)

    def _fits(self, space: Space) -> bool:
        """Whether a database of all levels takes few enough bytes; masks take none."""
        if self.setting.compensation is None:
            return True
        database = self.database
        weights = sum(
            p.numel() * database.dtype_of(p).itemsize for p in self.setting.model.parameters()
        )
        return database.count_bytes(space.counts_by_group()) <= LARGEST * weights

    def settle(self, counts: Mapping[str, int]) -> dict[str, int]:
        """These counts, moved to the limit by single steps of the slots, finer than levels are.

        What is checked is then what an ordinary run with its shares cuts.
        """
        steps = zip((slot.name for slot in self.budget.slots), self.steps_of(counts), strict=True)
        settled = self.budget.counts(polish(self.budget, dict(steps), self.budget.limit))
        return {name: round(count) for name, count in settled.items()}

    def steps_of(self, counts: Mapping[str, int]) -> Candidate:
        """The step of each slot at these counts."""
        return tuple(
            nearest_step(slot, counts.get(slot.name, 0) / slot.factors[slot.name])
            for slot in self.budget.slots
        )


def make_budget(setting: Setting, shares: Mapping[str, float]) -> Budget:
    """The budget of the run, with these shares."""
    return Budget(
        slots=make_slots(setting.scope, setting.groups, shares, setting.demands),
        cost=setting.cost,
        limit=setting.limit,
    )


def make_builder(setting: Setting, budget: Budget, samples: Samples) -> Builder:
    """The builder of levels; units that are not chosen layer by layer are scored now."""
    assignment = Assignment(
        model=setting.model,
        graph=setting.graph,
        groups=setting.groups,
        budget=budget,
        batches=samples.database,
        importance=setting.importance,
        compensation=setting.compensation,
        protected=setting.protected,
    )
    orders = None
    if not setting.layerwise or setting.importance.by_layer is None:
        orders = _order_units(assignment)
    return Builder(assignment=assignment, damping=setting.damping, orders=orders)


def _order_units(assignment: Assignment) -> dict[str, list[int]]:
    """Group → its units, the first to go first, by scores of the dense model."""
    importance = assignment.importance.at_once
    if importance is None:
        name = assignment.importance.name
        raise ConfigError(f"importance={name} works layer by layer: use schedule=layerwise")
    structures = importance.structures(
        assignment.model, assignment.graph, assignment.groups, assignment.batches
    )
    scores = combine_scores(assignment, importance, structures, {})
    return {name: values.argsort(stable=True).tolist() for name, values in scores.items()}
