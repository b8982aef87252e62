"""Compensations: what happens to the columns that stay in a consumer when others leave."""

from abc import ABC, abstractmethod

from torch import Tensor

from prunekit.compensation.solver import remove_columns


class Compensation(ABC):
    """Repairs a consumer."""

    @abstractmethod
    def repair(self, weight: Tensor, inverse: Tensor, removed: Tensor) -> Tensor:
        """The consumer's new weight W [d, n], its `removed` columns zero, given A = (H + λI)⁻¹ [n, n]."""


class Obs(Compensation):
    """The least-squares optimum of what stays."""

    def repair(self, weight: Tensor, inverse: Tensor, removed: Tensor) -> Tensor:
        """W − W_S (A_SS)⁻¹ A_S:."""
        return remove_columns(weight, inverse, removed)
