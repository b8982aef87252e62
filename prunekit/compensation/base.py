"""Compensations: how the columns that stay in a consumer make up for those that leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from prunekit.calibration.observe import Site
from prunekit.calibration.statistics import Statistics
from prunekit.calibration.weighting import EQUAL, Weighting

# What the consumers of a group must reproduce on the inputs that the pruned layers before them
# give: their own outputs on these inputs, their outputs in the dense model, or the residual stream
# of the dense model behind them.
Target = Literal["pruned", "dense", "residual"]


class Compensation(ABC):
    """Repairs the consumers of units that are removed."""

    # Whether consumers without a bias get one: parameters that the budget must count.
    adds_biases: ClassVar[bool] = False
    # Whether `repair` reads `statistics.inverse`; otherwise the inverse may be missing.
    needs_inverse: ClassVar[bool] = True

    @abstractmethod
    def repair(
        self, weight: Tensor, statistics: Statistics, removed: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Repair W [d, n], from which the columns `removed` [k] go.

        Returns:
            The new W [d, n], whose removed columns are zero, and what is added to the bias [d], or
            None where the bias stays. `weight` itself does not change.
        """

    @property
    def weighting(self) -> Weighting:
        """How tokens are weighed in the moments that consumers are repaired by: all alike."""
        return EQUAL

    def target_of(self, kind: str) -> Target:
        """The target of groups of this kind: attention, query_head, mlp, channel, …"""
        return "pruned"

    def centred(self, site: Site) -> bool:
        """Whether the biases of a site's consumers take up the mean of the inputs."""
        return False
