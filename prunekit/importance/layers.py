"""Importances of whole layers: by what they change, by what the loss says without them, or simply
every other one.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.calibration.gradients.loss import mean_loss
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group, LayerStack
from prunekit.importance.base import ScoreImportance
from prunekit.model.inputs import without_cache
from prunekit.model.stack import hidden_of_call, hidden_of_output
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed
from prunekit.surgery.masking import masked


@dataclass(frozen=True, kw_only=True)
class Similarity(ScoreImportance):
    """1 − the mean cosine of a layer's input and output (block influence, Men et al. 2024, arXiv
    2403.03853).
    """

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One forward pass over the calibration set; padding does not count."""
        stacks = _expect_stacks("similarity", groups)
        sums = {
            group.name: torch.zeros(2, group.num_units, dtype=torch.float64) for group in stacks
        }
        mask: Tensor | None = None

        def hook(
            total: Tensor, unit: int, _: nn.Module, args: Any, kwargs: Any, output: Any
        ) -> None:
            before, after = hidden_of_call(args, kwargs), hidden_of_output(output)
            assert before is not None
            assert after is not None
            cosines = F.cosine_similarity(before.float(), after.float(), dim=-1)
            kept = cosines[mask] if mask is not None else cosines.flatten()
            total[:, unit] += torch.tensor([(1 - kept.double()).sum().item(), kept.numel()])

        with undisturbed(model), ExitStack() as stack, torch.no_grad():
            for group in stacks:
                for unit in range(group.num_units):
                    layer = model.get_submodule(f"{group.module}.{unit}")
                    see = partial(hook, sums[group.name], unit)
                    stack.callback(layer.register_forward_hook(see, with_kwargs=True).remove)
            for batch in track(batches, "similarity", len(batches)):
                given = batch.get("attention_mask")
                mask = given.bool() if isinstance(given, Tensor) and given.ndim == 2 else None
                model(**without_cache(model, batch))
        return {
            name: (total[:1] / total[1:].clamp_min(1)).clamp_min(0) for name, total in sums.items()
        }


@dataclass(frozen=True, kw_only=True)
class Ablation(ScoreImportance):
    """The loss without a unit; as many forward passes as there are units: meant for layers and
    heads.
    """

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """What the mean loss rises by with one unit masked."""
        units = [(group, unit) for group in groups for unit in range(group.num_units)]
        found = {
            group.name: torch.zeros(1, group.num_units, dtype=torch.float64) for group in groups
        }
        with undisturbed(model), torch.no_grad():
            dense = calibration_loss(model, batches)
            for group, unit in track(units, "ablation", len(units)):
                with masked(model, graph, {group.name: [unit]}):
                    found[group.name][0, unit] = calibration_loss(model, batches) - dense
        return found


@dataclass(frozen=True, kw_only=True)
class Alternate(ScoreImportance):
    """Every other layer goes first (as in LLM-Pruner's table 8), evenly spread where fewer go."""

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """The place in the order in which layers go; needs no data."""
        stacks = _expect_stacks("alternate", groups)
        return {stack.name: _order(stack.num_units)[None] for stack in stacks}


def calibration_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss over the calibration set, under the caller's grad mode."""
    losses = [mean_loss(model, batch) for batch in batches]
    counts = [sum(loss.counts) for loss in losses]
    total = sum(loss.value.item() * count for loss, count in zip(losses, counts, strict=True))
    return total / max(sum(counts), 1)


def _order(size: int) -> Tensor:
    """0 for the layer that goes first: 1, 3, 5 … by bit reversal of their place, then the even
    ones; float64 [size].
    """
    odd = range(1, size, 2)
    bits = max(len(odd) - 1, 0).bit_length()
    spread = sorted(range(len(odd)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2) if bits else 0)
    ranks = torch.zeros(size, dtype=torch.float64)
    for rank, layer in enumerate([*(odd[i] for i in spread), *range(0, size, 2)]):
        ranks[layer] = rank
    return ranks


def _expect_stacks(name: str, groups: Sequence[Group]) -> list[LayerStack]:
    stacks = []
    for group in groups:
        if not isinstance(group, LayerStack):
            raise ConfigError(
                f"importance={name} scores whole layers (groups=layer), not {group.name}"
            )
        stacks.append(group)
    return stacks
