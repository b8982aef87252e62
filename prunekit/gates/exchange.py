"""Units at the border of what stays change places, once gates are trained, where the loss falls."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prunekit.gates.rule import Rule

Pair = tuple[int, int]  # a unit that stays, and one of the same group that goes


@torch.no_grad()
def exchange(rule: Rule, judge: Callable[[], float], trials: int) -> int:
    """Let the scores of units change places in pairs, those nearest to the border first.

    Args:
        rule: its gates; the target is asked for already.
        judge: the loss of the settled gates, the same on all processes.
        trials: how many pairs are tried.

    Returns:
        How many pairs have changed places for good.
    """
    scores, count, tried = next(iter(rule.parameters.values())), 0, set[Pair]()
    best = judge()
    for _ in range(trials):
        pair = next((pair for pair in _pairs(rule, scores, trials) if pair not in tried), None)
        if pair is None:
            break
        _swap(scores, pair)
        loss = judge()
        if loss < best:
            best, count = loss, count + 1
            tried.clear()
        else:
            _swap(scores, pair)
            tried.add(pair)
    return count


def _swap(scores: Tensor, pair: Pair) -> None:
    scores[list(pair)] = scores[list(reversed(pair))]


def _pairs(rule: Rule, scores: Tensor, most: int) -> Iterator[Pair]:
    """Pairs of units that may change places, by the difference of their scores."""
    kept, values = (rule.chosen() > 0).cpu(), scores.cpu()
    free, found = (rule.pins == 0).cpu(), list[tuple[float, Pair]]()
    for units in torch.arange(len(values)).split(rule.layout.sizes):
        stay, go = units[kept[units] & free[units]], units[~kept[units] & free[units]]
        lowest = stay[values[stay].argsort()][:most].tolist()
        highest = go[values[go].argsort(descending=True)][:most].tolist()
        found += [
            (float(values[one] - values[two]), (one, two)) for one in lowest for two in highest
        ]
    return (pair for _, pair in sorted(found))
