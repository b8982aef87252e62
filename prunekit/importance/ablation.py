"""The loss without a unit: the exact form of what Taylor importance approximates.

I_u = L(W_u = 0) − L(W), L the mean loss over the calibration set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.loss import calibration_loss
from prunekit.data.batches import Batch
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import ScoreImportance
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed
from prunekit.surgery.masking import masked


@dataclass(frozen=True, kw_only=True)
class Ablation(ScoreImportance):
    """What the loss rises by when a unit is masked.

    It takes a pass over the calibration set for each unit: meant for whole layers, and for heads of
    small models.
    """

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One structure a group: a unit is masked as a whole. A score may be negative."""
        units = [(group, unit) for group in groups for unit in range(group.num_units)]
        rises = {
            group.name: torch.zeros(1, group.num_units, dtype=torch.float64) for group in groups
        }
        with undisturbed(model), torch.no_grad():
            dense = calibration_loss(model, batches)
            for group, unit in track(units, "ablation", len(units)):
                with masked(model, graph, {group.name: [unit]}):
                    rises[group.name][0, unit] = calibration_loss(model, batches) - dense
        return rises
