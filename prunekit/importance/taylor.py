"""Taylor importance (LLM-Pruner, section 3.2): how much the loss changes when a unit's weights
become zero.

g is the gradient of the mean loss over the calibration set, F_kk = Σ_j g_jk² over its samples' own
gradients.

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

from prunekit.calibration.gradients import FISHER, MEAN, Moments
from prunekit.calibration.gradients.scores import score_positions
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import ScoreImportance
from prunekit.importance.structures import sum_by_structure


@dataclass(frozen=True, kw_only=True)
class _Taylor(ScoreImportance, ABC):
    """Over every member of a unit, biases and norms included.

    `memory`: bytes that accumulated gradients may take, further passes over the data make up for
    it; null: no limit. `checkpointing`: recompute layers in the backward pass instead of keeping
    their activations.
    """

    moments: ClassVar[tuple[str, ...]]
    memory: int | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory is not None and self.memory < 1:
            raise ConfigError(
                f"importance.memory: expected a positive number of bytes or null, got {self.memory}"
            )

    @abstractmethod
    def elements(self, weight: Tensor, moments: Moments) -> Tensor:
        """A parameter, and its gradient and Fisher information as asked for in `moments` → a term
        per element.

        All have the parameter's shape. A position's score is |the sum of its elements' terms|.
        """

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """The model's own gradients, flags and hooks are left as they were."""
        scores = score_positions(
            model,
            graph,
            groups,
            batches,
            self.elements,
            moments=self.moments,
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

    def elements(self, weight: Tensor, moments: Moments) -> Tensor:
        """Terms g w that cancel along a channel."""
        return moments[MEAN] * weight


@dataclass(frozen=True, kw_only=True)
class TaylorFirst(_Taylor):
    """Σ_k |g_k w_k|."""

    moments: ClassVar[tuple[str, ...]] = (MEAN,)

    def elements(self, weight: Tensor, moments: Moments) -> Tensor:
        """|g w|."""
        return (moments[MEAN] * weight).abs_()


@dataclass(frozen=True, kw_only=True)
class TaylorSecond(_Taylor):
    """Σ_k w_k² F_kk."""

    moments: ClassVar[tuple[str, ...]] = (FISHER,)

    def elements(self, weight: Tensor, moments: Moments) -> Tensor:
        """w² F."""
        return (moments[FISHER] * weight).mul_(weight)


@dataclass(frozen=True, kw_only=True)
class TaylorMixed(_Taylor):
    """Σ_k |g_k w_k − ½ w_k² F_kk|."""

    moments: ClassVar[tuple[str, ...]] = (MEAN, FISHER)

    def elements(self, weight: Tensor, moments: Moments) -> Tensor:
        """|w (g − ½ w F)|."""
        return (moments[FISHER] * weight).mul_(-0.5).add_(moments[MEAN]).mul_(weight).abs_()
