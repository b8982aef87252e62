"""Compensations: what happens to the columns that stay in a consumer when others leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor

from prunekit.calibration.observe import Site
from prunekit.calibration.statistics import Statistics

Target = Literal["pruned", "dense", "residual"]


class Compensation(ABC):
    """Repairs a consumer."""

    @abstractmethod
    def repair(
        self, weight: Tensor, statistics: Statistics, removed: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The consumer's new weight W [d, n], its `removed` columns zero, and what is added to its
        bias [d], if so.
        """

    def target_of(self, kind: str) -> Target:
        """What the consumers of groups of this kind are to reproduce."""
        return "pruned"

    def centred(self, site: Site) -> bool:
        """Whether a site's biases take up what its inputs are on average."""
        return False
