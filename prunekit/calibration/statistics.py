"""What is known of the inputs of a site: their moments, and the damped inverse of the Hessian once
it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from prunekit.calibration.moments import Moments
from prunekit.calibration.observe import Site
from prunekit.obs.inverse import Inverse, Problem, invert


@dataclass(kw_only=True)
class Statistics:
    """What is known of a site's inputs: their moments, and A = (H + λI)⁻¹ once it is asked for.

    `centred`: H is the inputs' covariance, for consumers whose bias can take up the mean.
    """

    site: Site
    damping: float
    centred: bool = False
    share: float = field(default=0.0, init=False)
    shift: Tensor | None = field(
        default=None, init=False
    )  # [d], what the biases take up of a target

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
        """W [d, n] to cut: the site's, or where it has a target, nearer to what gives the target on
        these inputs.

        With errors e = t − W x̂ and D = E[e x̂ᵀ] the least squares, ridge-regularised towards W,
        are W + D(H + λI)⁻¹ (centred: of covariances, and E[e] − Δ E[x̂] goes into the bias). Only
        the share of that step is taken that is best on the held-out samples: with Δ, c of the
        others, argmin over α in [0, 1] of E‖e − α(Δx̂ + c)‖² there. Then the held-out samples join
        in.
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
    """Argmin over α in [0, 1] of E‖e − α(Δx + c)‖² = ⟨Δ, D⟩ + c·E[e] over ⟨ΔH, Δ⟩ + 2 c·ΔE[x] +
    ‖c‖².
    """
    assert held.cross is not None and held.error is not None
    gain = (step * held.cross).sum() + offset @ held.error
    scale = ((step @ held.hessian) * step).sum() + 2 * offset @ (step @ held.mean) + offset @ offset
    return min(max((gain / scale).item(), 0.0), 1.0) if scale > 0 else 0.0
