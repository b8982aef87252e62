"""The policy that searches where to cut (the plan of Týr-the-Pruner, arXiv 2503.09657).

Formulas seed it. Each round builds a database of levels around the best cut known so far, packs a
knapsack of their prices, takes guided steps, and lets evolution go on from there; the next round
has half the step. The seeds, the knapsacks and the winners of the rounds are also cut as an
ordinary run would cut them: only these are compared.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

from prunekit.data.batches import Batch, count_positions
from prunekit.errors import ConfigError, suggest
from prunekit.policies import (
    ExpectedLoss,
    LinearDecrease,
    LinearIncrease,
    LogDecrease,
    LogIncrease,
    Uniform,
)
from prunekit.policies.base import Policy, Setting, is_number
from prunekit.runtime.console import say
from prunekit.search.bench import Bench, Checked, make_budget
from prunekit.search.evolution import Stage
from prunekit.search.fitness import CHUNK
from prunekit.search.rounds import Effort, Result, Start, run_round
from prunekit.search.samples import Samples, split_samples
from prunekit.search.shelf import Shelf
from prunekit.search.verdict import describe_search

FORMULAS: Mapping[str, type[Policy]] = {
    "uniform": Uniform,
    "log_increase": LogIncrease,
    "linear_increase": LinearIncrease,
    "log_decrease": LogDecrease,
    "linear_decrease": LinearDecrease,
    "expected_loss": ExpectedLoss,
}
KNAPSACK = "knapsack"


@dataclass(frozen=True, kw_only=True)
class Search(Policy):
    """Shares found by search.

    Args:
        step: the share of a group's units between two levels, in the first round; it is halved from
            round to round.
        levels: how many levels a group has in later rounds, around the one it had before.
        seeds: what the search begins with: formulas by their names, expected_loss among them, and
            knapsack, of which each later round has one of its own.
        rounds: how often a database is built around the best cut so far; fewer, where a round's
            winner is no better on held-out samples.
        prices: into how many parts the levels of a group are divided, to be priced for the knapsack
            and the guided steps.
        sweeps: guided steps of a round at most.
        generations: generations of a round whose guided steps found nothing better.
        children: children of a generation.
        survivors: how many of them are left after each stage of judging.
        tokens: how many tokens they are judged on at each stage.
        fitness: the share of the calibration samples that candidates are judged on.
        held_out: the share of the calibration samples that the winner is compared on.

    Raises:
        ConfigError: an option out of range.
    """

    measures: ClassVar[bool] = True
    empties: ClassVar[bool] = True
    step: float = 0.125
    levels: int = 8
    seeds: Sequence[str] = ("expected_loss", KNAPSACK)
    rounds: int = 3
    prices: int = 4
    sweeps: int = 1
    generations: int = 2
    children: int = 16
    survivors: Sequence[int] = (4, 1)
    tokens: Sequence[int] = (1024, 4096)
    fitness: float = 0.25
    held_out: float = 0.25

    def __post_init__(self) -> None:
        if not (is_number(self.step) and 0 < self.step <= 0.5):
            raise ConfigError(f"policy.step: expected a number in (0, 0.5], got {self.step!r}")
        for key in ("levels", "rounds", "prices", "children"):
            _expect_number(key, getattr(self, key), 1)
        for key in ("sweeps", "generations"):
            _expect_number(key, getattr(self, key), 0)
        for key in ("survivors", "tokens"):
            values = getattr(self, key)
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ConfigError(f"policy.{key}: expected a list of numbers, got {values!r}")
            for value in values:
                _expect_number(key, value, 1)
        if len(self.survivors) != len(self.tokens):
            raise ConfigError(
                "policy.survivors: expected a number for each stage of policy.tokens, got "
                f"{len(self.survivors)} and {len(self.tokens)}"
            )
        parts = (self.fitness, self.held_out)
        if not all(is_number(part) and part > 0 for part in parts) or sum(parts) >= 1:
            raise ConfigError(
                "policy.fitness, policy.held_out: expected shares > 0 of the samples that leave "
                f"some for the database, got {self.fitness!r} and {self.held_out!r}"
            )
        self._check_seeds()

    def _check_seeds(self) -> None:
        known = [*FORMULAS, KNAPSACK]
        seeds = [self.seeds] if isinstance(self.seeds, str) else self.seeds
        for name in seeds:
            if name not in known:
                raise ConfigError(f"policy.seeds: unknown {name!r}: {suggest(str(name), known)}")
        if not any(name in FORMULAS for name in seeds):
            raise ConfigError(f"policy.seeds: expected one of {', '.join(FORMULAS)}, got {seeds}")
        object.__setattr__(self, "seeds", tuple(seeds))

    def group_shares(self, setting: Setting) -> dict[str, float]:
        """The shares of the winner, or of the best seed where it isn't better beyond doubt.

        Raises:
            ConfigError: groups that can't be searched, or that compete.
            DataError: too few calibration samples.
        """
        if setting.scope.ranking != "local":
            raise ConfigError(
                f"policy=search: expected scope=local, got scope.ranking={setting.scope.ranking}, "
                "where scores settle how much each group loses"
            )
        tokens = min(*self.tokens, CHUNK)
        samples = split_samples(setting.batches, self.fitness, self.held_out, tokens)
        stages = self._stages(samples.fitness)
        with Bench.open(setting, samples, max(stage.batches for stage in stages)) as bench:
            seeds = self._check_formulas(bench)
            results = self._run_rounds(bench, seeds, stages)
        if packed := results[0].packed:
            seeds[KNAPSACK] = packed
        return self._take(setting, samples, seeds, results)

    def _check_formulas(self, bench: Bench) -> dict[str, Checked]:
        """The formulas among the seeds, cut as an ordinary run would."""
        checked = {}
        for name in self.seeds:
            if name in FORMULAS:
                check = partial(_check, bench, FORMULAS[name]())
                content = bench.setting.tools.remember(f"search-{name}", check)
                checked[name] = Checked.from_json(content)
                say(f"seed {name}: KL to the dense model {checked[name].fitness:.4f}")
        return checked

    def _run_rounds(
        self, bench: Bench, seeds: Mapping[str, Checked], stages: Sequence[Stage]
    ) -> list[Result]:
        """Rounds around the best cut so far, while held-out samples confirm that they help."""
        effort = Effort(
            sweeps=self.sweeps,
            generations=self.generations,
            children=self.children,
            prices=self.prices,
            stages=stages,
        )
        best = min(seeds.values(), key=lambda checked: checked.fitness)
        others = [checked.counts for checked in seeds.values() if checked is not best]
        results: list[Result] = []
        for number in range(1, self.rounds + 1):
            say(f"round {number} of {self.rounds}")
            step = self.step / 2 ** (number - 1)
            start = Start(
                centre=best.counts,
                others=[] if results else others,
                step=step,
                reach=step * self.levels / 2 if results else 1.0,
                packs=KNAPSACK in self.seeds,
                first=not results,
                to_beat=best.held_out if results else None,
                last=number == self.rounds,
            )
            rng = random.Random(f"{bench.setting.seed} {number}")
            shelf = Shelf(tools=bench.setting.tools, name=f"search-round-{number}")
            run = partial(_run, bench, start, effort, rng, shelf)
            content = bench.setting.tools.remember(shelf.name, run)
            shelf.clear()
            result = Result.from_json(content)
            say(f"its winner, cut exactly: KL to the dense model {result.winner.fitness:.4f}")
            results.append(result)
            if not start.helps(result.winner):
                say("held-out samples don't confirm that this round helps")
                break
            cuts = [best, result.winner, *([result.packed] if result.packed else [])]
            best = min(cuts, key=lambda checked: checked.fitness)
        return results

    def _stages(self, batches: Sequence[Batch]) -> list[Stage]:
        """The stages of a generation: the fewest of these batches with so many tokens."""
        totals = list(accumulate(math.prod(count_positions(batch)) for batch in batches))
        return [
            Stage(batches=min(bisect_left(totals, tokens) + 1, len(totals)), survivors=survivors)
            for tokens, survivors in zip(self.tokens, self.survivors, strict=True)
        ]

    def _take(
        self,
        setting: Setting,
        samples: Samples,
        seeds: Mapping[str, Checked],
        results: Sequence[Result],
    ) -> dict[str, float]:
        """The shares of the cut that is taken; the search is noted for the report."""
        figures = describe_search(setting, samples, seeds, results)
        say(figures.verdict)
        setting.notes["search"] = figures
        return dict(figures.cuts[figures.taken].shares)


def _check(bench: Bench, formula: Policy) -> dict[str, Any]:
    """The model cut by a formula, as JSON; one that measures sees the database's samples alone."""
    setting = replace(bench.setting, batches=bench.builder.assignment.batches)
    counts = make_budget(setting, formula.group_shares(setting)).solve()
    return bench.check(counts).to_json()


def _run(
    bench: Bench, start: Start, effort: Effort, rng: random.Random, shelf: Shelf
) -> dict[str, Any]:
    """A round, as JSON."""
    return run_round(bench, start, effort, rng, shelf).to_json()


def _expect_number(key: str, value: object, least: int) -> None:
    """Raise ConfigError where an option is no whole number of at least so many."""
    if not (type(value) is int and value >= least):
        raise ConfigError(f"policy.{key}: expected a whole number ≥ {least}, got {value!r}")
