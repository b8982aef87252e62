"""Every other layer (LLM-Pruner, table 8): whole layers by their place alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.data.batches import Batch
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import ScoreImportance
from prunekit.importance.structures import expect_stacks


@dataclass(frozen=True, kw_only=True)
class Alternate(ScoreImportance):
    """Every other layer goes first, evenly spread where fewer go. Needs no data."""

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """The score of a layer is its rank in the order in which layers go."""
        return {
            stack.name: _rank_layers(stack.num_units)[None]
            for stack in expect_stacks(self.name, groups)
        }


def _rank_layers(size: int) -> Tensor:
    """The rank of each layer, 0 for the one that goes first; float64 [size].

    First go 1, 3, 5, …, in the order of their bit-reversed places (van der Corput's sequence), so
    that any number of them is spread evenly; then the even ones.
    """
    odd = range(1, size, 2)
    bits = max(len(odd) - 1, 0).bit_length()

    def reversed_bits(place: int) -> int:
        return int(f"{place:0{bits}b}"[::-1], 2) if bits else 0

    spread = sorted(range(len(odd)), key=reversed_bits)
    ranks = torch.zeros(size, dtype=torch.float64)
    for rank, layer in enumerate([*(odd[place] for place in spread), *range(0, size, 2)]):
        ranks[layer] = rank
    return ranks
