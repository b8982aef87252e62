"""Seeded uniform scores: the baseline that every method must beat. Needs no data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.data.batches import Batch
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import ScoreImportance
from prunekit.runtime.seeds import make_generator


@dataclass(frozen=True, kw_only=True)
class Random(ScoreImportance):
    """The scores of a group depend on the seed and the name of the group alone."""

    seed: int = 0

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """Uniform in [0, 1), times the parameters that go with a unit.

        Where groups compete by score per parameter, no kind of unit then goes before another.
        """
        return {
            group.name: self._draw(group)[None] * max(group.parameters_per_unit, 1)
            for group in groups
        }

    def _draw(self, group: Group) -> Tensor:
        generator = make_generator(self.seed, group.name)
        return torch.rand(group.num_units, generator=generator, dtype=torch.float64)
