"""Taylor importance (LLM-Pruner, section 3.2): how the loss changes where a unit is zeroed.

g is the gradient of the mean loss over the calibration set, and F_kk = Σ_j g_jk², g_j the gradient
of sample j alone: the diagonal of the Fisher information, in place of the Hessian.

first order, by channel (Vector)         |Σ_k g_k w_k|, channels summed over a unit
first order, elementwise (Element¹)      Σ_k |g_k w_k|
second order, elementwise (Element²)     Σ_k w_k² F_kk
both (the paper's equation 5)            Σ_k |g_k w_k − ½ w_k² F_kk|
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from prunekit.calibration.gradients import FISHER, MEAN, GradientMoments
from prunekit.calibration.gradients.scores import score_positions
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import ScoreImportance
from prunekit.importance.structures import sum_by_structure


@dataclass(frozen=True, kw_only=True)
class _Taylor(ScoreImportance, ABC):
    """Over all weights of a unit, biases and norms included.

    Args:
        memory: bytes that accumulated gradients may take; more passes over the data make up for a
            small number. None: a share of what is free.
        checkpointing: recompute layers in the backward pass instead of keeping their activations.
            None: where memory is short.
    """

    moments: ClassVar[tuple[str, ...]]  # which moments of the gradients `elements` needs
    linear: ClassVar[bool] = False  # whether `elements` is linear in the moments
    memory: int | None = None
    checkpointing: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory is not None and self.memory < 1:
            raise ConfigError(
                f"importance.memory: expected a positive number of bytes or null, got {self.memory}"
            )

    @abstractmethod
    def elements(self, weight: Tensor, moments: GradientMoments) -> Tensor:
        """A term for each element of a parameter, given the `moments` of its gradients.

        All have the shape of the parameter. The score of a position along a dim is the absolute
        value of the sum of its elements' terms.
        """

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """Backward passes over the calibration set; gradients, flags, hooks stay as they were."""
        scores = score_positions(
            model,
            graph,
            groups,
            batches,
            self.elements,
            moments=self.moments,
            linear=self.linear,
            memory=self.memory,
            checkpointing=self.checkpointing,
        )
        return {
            g.name: sum_by_structure(graph, g, lambda m: scores[m.parameter, m.dim]) for g in groups
        }


@dataclass(frozen=True, kw_only=True)
class TaylorVector(_Taylor):
    """|Σ_k g_k w_k| of each channel, channels summed over a unit."""

    moments: ClassVar[tuple[str, ...]] = (MEAN,)
    linear: ClassVar[bool] = True

    def elements(self, weight: Tensor, moments: GradientMoments) -> Tensor:
        """Terms g w that cancel along a channel."""
        return moments[MEAN] * weight


@dataclass(frozen=True, kw_only=True)
class TaylorFirst(_Taylor):
    """Σ_k |g_k w_k|."""

    moments: ClassVar[tuple[str, ...]] = (MEAN,)

    def elements(self, weight: Tensor, moments: GradientMoments) -> Tensor:
        """|g w|."""
        return (moments[MEAN] * weight).abs_()


@dataclass(frozen=True, kw_only=True)
class TaylorSecond(_Taylor):
    """Σ_k w_k² F_kk."""

    moments: ClassVar[tuple[str, ...]] = (FISHER,)
    linear: ClassVar[bool] = True

    def elements(self, weight: Tensor, moments: GradientMoments) -> Tensor:
        """w² F."""
        return (moments[FISHER] * weight).mul_(weight)


@dataclass(frozen=True, kw_only=True)
class TaylorMixed(_Taylor):
    """Σ_k |g_k w_k − ½ w_k² F_kk|."""

    moments: ClassVar[tuple[str, ...]] = (MEAN, FISHER)

    def elements(self, weight: Tensor, moments: GradientMoments) -> Tensor:
        """|w (g − ½ w F)|."""
        return (moments[FISHER] * weight).mul_(-0.5).add_(moments[MEAN]).mul_(weight).abs_()
