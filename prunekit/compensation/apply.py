"""Compensations: what happens to the columns that stay in a consumer when others leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from prunekit.compensation.hessian import Moments
from prunekit.compensation.observe import Site
from prunekit.compensation.solver import Inverse, Problem, invert, remove_columns
from prunekit.errors import ConfigError, suggest

Target = Literal["pruned", "dense", "residual"]


@dataclass(kw_only=True)
class Statistics:
    """What is known of a site's inputs: their moments, and A = (H + λI)⁻¹ once it is asked for.

    `centred`: H is the inputs' covariance, for consumers whose bias can take up the mean.
    """

    site: Site
    damping: float
    centred: bool = False
    share: float = field(default=0.0, init=False)
    shift: Tensor | None = field(default=None, init=False)  # [d], what the biases take up of a target

    @property
    def moments(self) -> Moments:
        """The inputs' moments."""
        return self.site.moments

    @cached_property
    def inverse(self) -> Inverse:
        """The damped inverse of the Hessian."""
        return self._inverse(self.moments)

    def _inverse(self, moments: Moments) -> Inverse:
        if not self.centred:
            return invert(moments.hessian, self.damping)
        return invert(moments.hessian - torch.outer(moments.mean, moments.mean), self.damping)

    def problem(self, weight: Tensor) -> Problem:
        """What to choose units by: W [d, n], where a dead input costs nothing, and A."""
        index = self.site.consumers[0].member.index.to(weight.device)
        dead = self.inverse.dead
        alive = weight.masked_fill(dead, 0) if dead.any() else weight
        return Problem(weight=alive, inverse=self.inverse.matrix, index=index)

    def weight(self) -> Tensor:
        """W [d, n] to cut: the site's, or where it has a target, nearer to what gives the target on these inputs.

        With errors e = t − W x̂ and D = E[e x̂ᵀ] the least squares, ridge-regularised towards W, are W + D(H + λI)⁻¹
        (centred: of covariances, and E[e] − Δ E[x̂] goes into the bias). Only the share of that step is taken that is
        best on the held-out samples: with Δ, c of the others, argmin over α in [0, 1] of E‖e − α(Δx̂ + c)‖² there.
        Then the held-out samples join in.
        """
        weight, held = self.site.weight(), self.site.held
        if held is None or not held.tokens:
            return weight
        step, offset = self._step(self.moments, self._inverse(self.moments).matrix)
        self.share = _best_share(step, offset, held)
        self.site.moments, self.site.held = Moments.together([self.moments, held]), None
        step, offset = self._step(self.moments, self.inverse.matrix)
        self.shift = self.share * offset if self.centred else None
        return weight + self.share * step.to(weight)

    def _step(self, moments: Moments, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Δ [d, n] and c [d] of the least squares for the errors."""
        cross, error = moments.cross, moments.error
        assert cross is not None and error is not None
        if not self.centred:
            return (cross.to(inverse) @ inverse).to(cross), torch.zeros_like(error)
        step = ((cross - torch.outer(error, moments.mean)).to(inverse) @ inverse).to(cross)
        return step, error - step @ moments.mean


def _best_share(step: Tensor, offset: Tensor, held: Moments) -> float:
    """Argmin over α in [0, 1] of E‖e − α(Δx + c)‖² = ⟨Δ, D⟩ + c·E[e] over ⟨ΔH, Δ⟩ + 2 c·ΔE[x] + ‖c‖²."""
    assert held.cross is not None and held.error is not None
    gain = (step * held.cross).sum() + offset @ held.error
    scale = ((step @ held.hessian) * step).sum() + 2 * offset @ (step @ held.mean) + offset @ offset
    return min(max((gain / scale).item(), 0.0), 1.0) if scale > 0 else 0.0


class Compensation(ABC):
    """Repairs a consumer."""

    @abstractmethod
    def repair(self, weight: Tensor, statistics: Statistics, removed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The consumer's new weight W [d, n], its `removed` columns zero, and what is added to its bias [d], if so."""

    def target_of(self, kind: str) -> Target:
        """What the consumers of groups of this kind are to reproduce."""
        return "pruned"

    def centred(self, site: Site) -> bool:
        """Whether a site's biases take up what its inputs are on average."""
        return False


@dataclass(frozen=True, kw_only=True)
class Obs(Compensation):
    """The least-squares optimum of what stays.

    `target`: what the consumers must reproduce from the inputs that the pruned layers before them give. pruned: what
    they compute on these (SlimGPT); dense: what they compute in the dense model; residual: what brings back the dense
    residual stream behind them (both take a dense stream through the layers beside the pruned one). `attention`,
    `mlp`: the same for the groups of that kind alone. `bias`: where a consumer has a bias, it takes up the mean of
    what is lost.
    """

    target: Target = "residual"
    attention: Target | None = None
    mlp: Target | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bias, bool):
            raise ConfigError(f"compensation.bias: expected true or false, got {self.bias!r}")
        for key in ("target", "attention", "mlp"):
            value = getattr(self, key)
            if value not in (*get_args(Target), *([] if key == "target" else [None])):
                known = suggest(str(value), list(get_args(Target)))
                raise ConfigError(f"compensation.{key}: unknown {value!r}: {known}")

    def target_of(self, kind: str) -> Target:
        """The kind's own target, or that of all."""
        own = {"attention": self.attention, "query_head": self.attention, "mlp": self.mlp}.get(kind)
        return own or self.target

    def centred(self, site: Site) -> bool:
        """Where asked for, and all the site's consumers have a bias."""
        return self.bias and all(consumer.bias is not None for consumer in site.consumers)

    def repair(self, weight: Tensor, statistics: Statistics, removed: Tensor) -> tuple[Tensor, Tensor | None]:
        """W − W_S (A_SS)⁻¹ A_S:."""
        repaired = remove_columns(weight, statistics.inverse.matrix, removed)
        if not statistics.centred:
            return repaired, None
        bias = (weight.to(repaired) - repaired) @ statistics.moments.mean.to(repaired)
        return repaired, bias if statistics.shift is None else bias + statistics.shift.to(bias)


@dataclass(frozen=True, kw_only=True)
class Bias(Compensation):
    """FLAP's: the removed inputs stay at their mean. A consumer without a bias gets one."""

    def repair(self, weight: Tensor, statistics: Statistics, removed: Tensor) -> tuple[Tensor, Tensor | None]:
        """W_S = 0, b + W_S E[x_S]."""
        bias = weight[:, removed] @ statistics.moments.mean[removed].to(weight)
        return weight.index_fill(1, removed, 0), bias
