"""The compensation of FLAP (An et al. 2023, arXiv 2312.11983): the mean of what is lost goes into
the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prunekit.calibration.statistics import Statistics
from prunekit.compensation.base import Compensation


@dataclass(frozen=True, kw_only=True)
class Bias(Compensation):
    """FLAP's: the removed inputs stay at their mean. A consumer without a bias gets one."""

    def repair(
        self, weight: Tensor, statistics: Statistics, removed: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """W_S = 0, b + W_S E[x_S]."""
        bias = weight[:, removed] @ statistics.moments.mean[removed].to(weight)
        return weight.index_fill(1, removed, 0), bias
