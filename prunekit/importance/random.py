"""Seeded uniform scores: the baseline every method must beat."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.data.batches import Batch
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import ScoreImportance


@dataclass(frozen=True, kw_only=True)
class Random(ScoreImportance):
    """Each group's scores depend on the seed and the group's name alone."""

    seed: int = 0

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """Uniform in [0, 1), times the parameters a unit frees: so that no kind goes first where
        groups compete.
        """
        return {
            group.name: self._draw(group)[None] * max(group.parameters_per_unit, 1)
            for group in groups
        }

    def _draw(self, group: Group) -> Tensor:
        digest = hashlib.sha256(f"{self.seed} {group.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(group.num_units, generator=generator, dtype=torch.float64)
