"""Weight magnitude: Σ |w|^p over everything a unit owns. Needs no data."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.graph import CoupledGroup, CouplingGraph
from prunekit.importance.base import Batch, ScoreImportance, sum_members


@dataclass(frozen=True, kw_only=True)
class Magnitude(ScoreImportance):
    """`p` = 2 (L2) or 1 (L1)."""

    p: int = 2

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise ConfigError(f"importance.p: expected 1 or 2, got {self.p}")

    def score(
        self, model: nn.Module, graph: CouplingGraph, groups: Sequence[CoupledGroup], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Σ_k |w_k|^p, summed over members."""
        return {g.name: sum_members(model, g, lambda _, w: w.double().abs() ** self.p) for g in groups}
