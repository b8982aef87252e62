"""Optimal Brain Surgeon as an importance: the error that is left after the best repair (SlimGPT, section 4.2)."""

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from prunekit.compensation.solver import HeadScore, choose_columns, choose_units
from prunekit.errors import ConfigError, suggest
from prunekit.importance.base import LayerImportance


@dataclass(frozen=True, kw_only=True)
class Obs(LayerImportance):
    """Heads by `heads`: exact, grouped_cholesky or diagonal; single columns greedily, exact."""

    heads: HeadScore = "exact"
    columns: str = "greedy"

    def __post_init__(self) -> None:
        for key, value, known in (("heads", self.heads, get_args(HeadScore)), ("columns", self.columns, ("greedy",))):
            if value not in known:
                raise ConfigError(f"importance.{key}: unknown {value!r}: {suggest(str(value), list(known))}")

    def choose(self, weight: Tensor, inverse: Tensor, index: Tensor, count: int) -> list[int]:
        """One unit at a time, each with the least error after the ones before it."""
        if index.shape[1] == 1:
            columns = index[:, 0]
            return choose_columns(weight[:, columns], inverse[columns][:, columns], count)
        return choose_units(weight, inverse, index, count, self.heads)
