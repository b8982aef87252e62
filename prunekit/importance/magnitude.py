"""Weight magnitude: I_u = Σ_{k ∈ u} |w_k|^p over all weights of a unit. Needs no data."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group, Member
from prunekit.importance.base import ScoreImportance
from prunekit.importance.structures import sum_by_structure
from prunekit.runtime.numbers import along, at_least_float32


@dataclass(frozen=True, kw_only=True)
class Magnitude(ScoreImportance):
    """`p` = 2 (L2) or 1 (L1); biases and norms of a unit count like any weight."""

    p: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.p not in (1, 2):
            raise ConfigError(f"importance.p: expected 1 or 2, got {self.p}")

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """Σ_k |w_k|^p of each structure."""

        def positions(member: Member) -> Tensor:
            weight = at_least_float32(model.get_parameter(member.parameter).detach())
            return along(weight.abs() ** self.p, member.dim)

        return {group.name: sum_by_structure(graph, group, positions) for group in groups}
