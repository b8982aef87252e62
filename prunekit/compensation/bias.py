"""The compensation of FLAP (An et al. 2023, arXiv 2312.11983): biases take up the mean of the loss.

b ← b + W_S E[x_S] for the removed columns S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunekit.calibration.statistics import Statistics
from prunekit.compensation.base import Compensation


@dataclass(frozen=True, kw_only=True)
class Bias(Compensation):
    """The removed inputs stay at their mean; a consumer without a bias gets one."""

    adds_biases: ClassVar[bool] = True
    needs_inverse: ClassVar[bool] = False

    def repair(
        self, weight: Tensor, statistics: Statistics, removed: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """W_S = 0, and W_S E[x_S] for the bias."""
        bias = weight[:, removed] @ statistics.moments.mean[removed].to(weight)
        return weight.index_fill(1, removed, 0), bias
