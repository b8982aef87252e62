"""Optimal Brain Surgeon as an importance: the error that is left after the best repair (SlimGPT, section 4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor, nn

from prunekit.compensation.solver import HeadScore, choose_columns, choose_units, invert, unit_errors
from prunekit.compensation.walk import walk
from prunekit.errors import ConfigError, suggest
from prunekit.graph import CoupledGroup, CouplingGraph
from prunekit.importance.base import Batch, LayerImportance, ScoreImportance


@dataclass(frozen=True, kw_only=True)
class Obs(ScoreImportance, LayerImportance):
    """Heads by `heads`: exact, grouped_cholesky or diagonal; single columns greedily, exact.

    Layer by layer it chooses one unit after another; at once, or where groups compete, units rank by the error each of
    them leaves alone in the dense model. `damping`: of the Hessians of that ranking, as the schedule's.
    """

    heads: HeadScore = "exact"
    columns: str = "greedy"
    damping: float = 0.0001

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value, known in (("heads", self.heads, get_args(HeadScore)), ("columns", self.columns, ("greedy",))):
            if value not in known:
                raise ConfigError(f"importance.{key}: unknown {value!r}: {suggest(str(value), list(known))}")

    def choose(self, weight: Tensor, inverse: Tensor, index: Tensor, count: int) -> list[int]:
        """One unit at a time, each with the least error after the ones before it."""
        if index.shape[1] == 1:
            columns = index[:, 0]
            return choose_columns(weight[:, columns], inverse[columns][:, columns], count)
        return choose_units(weight, inverse, index, count, self.heads)

    def structures(
        self, model: nn.Module, graph: CouplingGraph, groups: Sequence[CoupledGroup], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """E(S) of each unit alone on the model's own activations."""
        found = {}
        for group, consumer, moments in walk(model, groups, batches):
            inverse = invert(moments.hessian, self.damping)
            weight = consumer.weight().masked_fill(inverse.dead, 0)
            index = consumer.member.index.to(weight.device)
            found[group.name] = unit_errors(weight, inverse.matrix, index, self.heads)[None].cpu()
        return found
