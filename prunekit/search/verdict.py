"""Which cut is taken: the winner must beat the best seed on held-out samples beyond doubt.

The best seed is the one that would be taken instead. A worse seed may be so bad on a few samples
that no lead over it is beyond doubt; that is no reason to take the best one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prunekit.data.batches import count_positions
from prunekit.policies.base import Setting
from prunekit.report.parts import SearchedCut, SearchFigures
from prunekit.search.bench import Checked
from prunekit.search.fitness import subtract
from prunekit.search.rounds import Result
from prunekit.search.samples import Samples

WINNER = "winner"
_ERRORS = 2.0  # standard errors of the paired differences that the winner must lead by


def judge_cuts(seeds: Mapping[str, Checked], winner: Checked) -> tuple[str, str]:
    """The name of the cut that is taken (`WINNER`, or a seed's), and why, in a sentence."""
    best = min(seeds, key=lambda name: lead_over(winner, seeds[name])[0])
    lead, error = lead_over(winner, seeds[best])
    measured = f"by {lead:.4f} ± {error:.4f} on held-out samples"
    if not lead > _ERRORS * error:
        return best, (
            f"the search's winner is not better than the best seed, {best}, beyond doubt: it leads "
            f"{measured}; the seed is taken"
        )
    return WINNER, (
        f"the search's winner leads the best seed, {best}, {measured}: by more than {_ERRORS:g} "
        "standard errors; it is taken"
    )


def name_rounds(results: Sequence[Result]) -> dict[str, Checked]:
    """The winners of the rounds by their names in reports."""
    return {f"round {number}": result.winner for number, result in enumerate(results, 1)}


def lead_over(winner: Checked, other: Checked) -> tuple[float, float]:
    """By how much the winner's KL is lower on held-out samples, and the standard error of that."""
    return subtract(other.held_out, winner.held_out)


def describe_search(
    setting: Setting,
    samples: Samples,
    seeds: Mapping[str, Checked],
    results: Sequence[Result],
) -> SearchFigures:
    """What the report says of the search: the cut that is taken, why, and what else was tried."""
    rounds = name_rounds(results)
    best = min(rounds, key=lambda name: rounds[name].held_out.mean)
    winner = rounds[best]
    named = {**seeds, **rounds}
    taken, verdict = judge_cuts(seeds, winner)
    tokens = sum(math.prod(count_positions(batch)) for batch in setting.batches)
    sizes = {group.name: group.num_units for group in setting.groups}
    cuts = {}
    for name, cut in named.items():
        lead, error = lead_over(winner, cut)
        cuts[name] = SearchedCut(
            fitness=cut.fitness,
            held_out=cut.held_out.mean,
            lead=lead,
            lead_error=error if math.isfinite(error) else 0.0,
            shares={group: cut.counts.get(group, 0) / size for group, size in sizes.items()},
        )
    parts = {"database": samples.database, "fitness": samples.fitness, "held_out": samples.held_out}
    return SearchFigures(
        taken=best if taken == WINNER else taken,
        verdict=verdict,
        cuts=cuts,
        rounds=tuple(result.figures for result in results),
        prices=results[-1].prices,
        evaluations=sum(result.figures.evaluations for result in results),
        passes=sum(result.figures.tokens for result in results) / tokens,
        samples={
            name: sum(count_positions(batch)[0] for batch in part) for name, part in parts.items()
        },
    )
