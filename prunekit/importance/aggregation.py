"""From scores of a group's structures to one score per unit (LLM-Pruner, section 3.2), and groups
made comparable.
"""

from typing import Literal

from torch import Tensor

Aggregation = Literal["sum", "mean", "max", "prod", "first", "last"]
Normalisation = Literal["none", "mean", "parameters"]


def aggregate(scores: Tensor, how: Aggregation) -> Tensor:
    """Scores [structures, units], in execution order, ≥ 0 where there are several → [units].

    prod is the geometric mean, taken in log space: the product's order, without its overflow. last
    is the last executing structure, LLM-Pruner's "Last-only".
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
    """Scores [units] of one group, as they are, over their mean, or over the parameters that one
    unit frees.
    """
    match how:
        case "none":
            return scores
        case "mean":
            return scores / scores.mean().clamp_min(1e-300)
        case "parameters":
            return scores / max(parameters_per_unit, 1)
