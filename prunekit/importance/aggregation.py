"""Aggregate the scores of a group's structures to one score per unit (LLM-Pruner, section 3.2).

And normalise the scores of groups that compete with each other.
"""

from typing import Literal

from torch import Tensor

Aggregation = Literal["sum", "mean", "max", "prod", "first", "last"]
Normalisation = Literal["none", "mean", "parameters"]
_TINY = 1e-300  # keeps 0/0 out where all scores of a group are zero


def aggregate(scores: Tensor, how: Aggregation) -> Tensor:
    """Scores [structures, units], in execution order, ≥ 0 where there are several → [units].

    `prod` is the geometric mean, taken in log space: it has the order of the product without its
    overflow. `last` is the last executing structure, "Last-only" of LLM-Pruner.
    """
    if len(scores) == 1:
        return scores[0]
    match how:
        case "sum":
            return scores.sum(0)
        case "mean":
            return scores.mean(0)
        case "max":
            return scores.amax(0)
        case "prod":
            return scores.log().mean(0).exp()
        case "first":
            return scores[0]
        case "last":
            return scores[-1]


def normalise(scores: Tensor, how: Normalisation, parameters_per_unit: int) -> Tensor:
    """The scores [units] of one group as they are, over their mean, or over a unit's parameters."""
    match how:
        case "none":
            return scores
        case "mean":
            return scores / scores.mean().clamp_min(_TINY)
        case "parameters":
            return scores / max(parameters_per_unit, 1)
