"""Compensations: what happens to the columns that stay in a consumer when others leave."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from prunekit.compensation.hessian import Moments
from prunekit.compensation.solver import Inverse, invert, remove_columns


@dataclass(kw_only=True)
class Statistics:
    """What is known of a consumer's inputs: their moments, and A = (H + λI)⁻¹ once it is asked for."""

    moments: Moments
    damping: float

    @cached_property
    def inverse(self) -> Inverse:
        """The damped inverse of the Hessian."""
        return invert(self.moments.hessian, self.damping)


class Compensation(ABC):
    """Repairs a consumer."""

    @abstractmethod
    def repair(self, weight: Tensor, statistics: Statistics, removed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The consumer's new weight W [d, n], its `removed` columns zero, and what is added to its bias [d], if so."""


class Obs(Compensation):
    """The least-squares optimum of what stays."""

    def repair(self, weight: Tensor, statistics: Statistics, removed: Tensor) -> tuple[Tensor, Tensor | None]:
        """W − W_S (A_SS)⁻¹ A_S:."""
        return remove_columns(weight, statistics.inverse.matrix, removed), None


class Bias(Compensation):
    """FLAP's: the removed inputs stay at their mean. A consumer without a bias gets one."""

    def repair(self, weight: Tensor, statistics: Statistics, removed: Tensor) -> tuple[Tensor, Tensor | None]:
        """W_S = 0, b + W_S E[x_S]."""
        bias = weight[:, removed] @ statistics.moments.mean[removed].to(weight)
        return weight.index_fill(1, removed, 0), bias
