"""From the moments of a site's inputs to the inverse its consumers are repaired by.

With H = E[x xᵀ] over the inputs x [n] of a site: A = (H + λI)⁻¹ (SlimGPT, section 3). Where the
consumers must reproduce a target t instead of their own outputs W x, W takes a step towards the
least squares for t first. `prepare_site` calls the pure functions below it in an order that keeps
as few matrices [n, n] alive as possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.calibration.moments import Moments
from prunekit.calibration.observe import Site
from prunekit.errors import ConfigError
from prunekit.obs.inverse import Inverse, Problem, cholesky, invert, solve

_RIDGE = 1e-6  # of the mean square of an output's gradient, so that G can be factorised
_MIXED = 1024  # random sums of outputs that stand for all of them


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The statistics of a site's inputs that a compensation may repair its consumers by.

    `moments`: of the inputs; its Hessian may be gone already where `inverse` is there.
    `inverse`: A = (H + λI)⁻¹ [n, n]; None where the compensation declares that it needs none.
    `centred`: A is that of the inputs' covariance, for biases that can take up the mean.
    `shift` [d]: the constant part of the step towards a target, which the biases take up.
    """

    moments: Moments
    inverse: Inverse | None = None
    centred: bool = False
    shift: Tensor | None = None

    @property
    def took_float64(self) -> bool:
        """Whether the Hessian is float32, and its inverse had to be float64."""
        return self.inverse is not None and self.inverse.matrix.dtype != self.moments.dtype


@dataclass(frozen=True, kw_only=True)
class TargetStep:
    """W [d, n] after its step towards a target, and the `shift` [d] that goes into the biases.

    The shift is None where the biases take up nothing.
    """

    weight: Tensor
    shift: Tensor | None


@dataclass(frozen=True, kw_only=True)
class SiteWork:
    """A site that is about to be cut.

    `weight`: W [d, n] of its consumers, below one another, in float32 at least. `share`: how much
    of the step towards a target W has taken, in [0, 1]; zero where there is no target. `choosing`:
    the inverse by which units are chosen, where it is not the one of the statistics.
    """

    site: Site
    weight: Tensor
    statistics: Statistics
    share: float = 0.0
    choosing: Inverse | None = None

    def pose_problem(self) -> Problem:
        """The problem of choosing units by W and the inverse, which must be there."""
        inverse = self.choosing or self.statistics.inverse
        assert inverse is not None
        return pose_problem(self.site, self.weight, inverse)


def prepare_site(site: Site, damping: float, *, centred: bool, inverted: bool) -> SiteWork:
    """Take the weights of a site, move them towards their target if any, invert the moments.

    Without `inverted` the moments are inverted only where a target needs it. The held-out moments
    of the site are merged into its others, and let go of, before the inversion: no more than three
    matrices [n, n] are alive at once.
    """
    weight, held = site.weight(), site.held
    if held is None or not held.tokens:
        inverse = invert_moments(site.moments, damping, centred=centred) if inverted else None
        known = Statistics(moments=site.moments, inverse=inverse, centred=centred)
        return SiteWork(site=site, weight=weight, statistics=known)
    share = measure_share(site.moments, held, damping, centred=centred)
    del held
    site.merge_held_out()
    inverse = invert_moments(site.moments, damping, centred=centred)
    step = step_towards_target(weight, site.moments, inverse, share, centred=centred)
    known = Statistics(moments=site.moments, inverse=inverse, centred=centred, shift=step.shift)
    return SiteWork(site=site, weight=step.weight, statistics=known, share=share)


def invert_moments(moments: Moments, damping: float, *, centred: bool = False) -> Inverse:
    """A = (H + λI)⁻¹ [n, n]; `centred`: of the covariance H − E[x] E[x]ᵀ instead of H.

    `damping` is λ / mean(diag H) to start with; `prunekit.obs.inverse.invert` raises it where the
    factorisation needs more.
    """
    return invert(_hessian_of(moments, centred), damping)


def _hessian_of(moments: Moments, centred: bool) -> Tensor:
    """H, or the covariance H − E[x] E[x]ᵀ [n, n]."""
    if not centred:
        return moments.hessian
    return moments.hessian - torch.outer(moments.mean, moments.mean)


def pose_problem(site: Site, weight: Tensor, inverse: Inverse) -> Problem:
    """The problem of choosing units by W [d, n] and A; weights on dead inputs cost nothing."""
    index = site.consumers[0].member.index.to(weight.device)
    alive = weight.masked_fill(inverse.dead, 0) if inverse.dead.any() else weight
    if site.metric is not None:
        alive = weigh_outputs(alive, site.metric)
    return Problem(weight=alive, inverse=inverse.matrix, index=index)


def weigh_outputs(weight: Tensor, metric: Tensor) -> Tensor:
    """W' [d, n] with ‖W' x‖² = (W x)ᵀ G W x / mean(diag G), given G [d, d], or its diagonal [d].

    Choosing by W' weighs the errors of the outputs y by G; with G = E[δ δᵀ], δ = ∂L/∂y, that is the
    Fisher information of the outputs (K-FAC, Martens and Grosse 2015). No repair depends on G:
    least squares is solved for each output alone.
    """
    own = metric.to(weight.device, torch.float64)
    diagonal = own if own.ndim == 1 else own.diagonal()
    mean = diagonal.mean()
    if not mean > 0:
        return weight
    if own.ndim == 1:
        return weight * (own / mean).sqrt().to(weight)[:, None]
    factor = cholesky(own / mean + _RIDGE * torch.eye(len(own), device=own.device))
    return factor.T.to(weight) @ weight


def scale_of_loss(site: Site) -> float:
    """What errors by W' (`weigh_outputs`) are multiplied by to be those by G as it is.

    Raises:
        ConfigError: the outputs of the site have no gradients.
    """
    if site.metric is None:
        raise ConfigError(
            f"{site.moments.name}: expected one consumer for each group, whose outputs' gradients "
            "tell how the loss rises (importance.compete=loss)"
        )
    diagonal = site.metric if site.metric.ndim == 1 else site.metric.diagonal()
    return float(diagonal.double().mean())


def measure_share(moments: Moments, held: Moments, damping: float, *, centred: bool) -> float:
    """The share α in [0, 1] of the step towards a target that serves held-out samples best.

    The step (Δ, c) is the least squares on `moments`; the share is the minimum over α of
    E‖e − α(Δx + c)‖² on `held`, where e is what the outputs lack of their target:

        α = (⟨Δ, E[e xᵀ]⟩ + c·E[e]) / (⟨ΔH, Δ⟩ + 2 c·ΔE[x] + ‖c‖²)

    All terms are sums over the outputs. Where there are more than 1,024, as many random sums of
    them take their place (Hutchinson's estimator of a trace).
    """
    cross, error = _mix_outputs(moments)
    step, offset = solve_step(
        cross,
        error,
        moments.mean,
        lambda right: solve(_hessian_of(moments, centred), right, damping),
        centred=centred,
    )
    cross, error = _mix_outputs(held)
    gain = (step * cross).sum() + offset @ error
    scale = ((step @ held.hessian) * step).sum() + 2 * offset @ (step @ held.mean) + offset @ offset
    share = torch.where(scale > 0, gain / scale, 0.0).clamp(0, 1)
    return share.item()


def step_towards_target(
    weight: Tensor, moments: Moments, inverse: Inverse, share: float, *, centred: bool
) -> TargetStep:
    """Move W [d, n] by the `share` of the step that gives the target on these inputs."""
    cross, error = moments.of_errors()
    matrix = inverse.matrix
    step, offset = solve_step(
        cross,
        error,
        moments.mean,
        lambda right: (right.to(matrix) @ matrix).to(right),
        centred=centred,
    )
    return TargetStep(
        weight=weight + share * step.to(weight), shift=share * offset if centred else None
    )


def solve_step(
    cross: Tensor,
    error: Tensor,
    mean: Tensor,
    times_inverse: Callable[[Tensor], Tensor],
    *,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """The step Δ [d, n] and the constant c [d] of the least squares for the errors of the outputs.

    With errors e = t − W x, their mean `error` [d] and D = E[e xᵀ] in `cross` [d, n],
    ridge-regularised towards W: Δ = D (H + λI)⁻¹ and c = 0. Centred, D and H are covariances, and
    c = E[e] − Δ E[x] is for the biases, with E[x] the `mean` [n]. `times_inverse` multiplies a
    matrix [d, n] by (H + λI)⁻¹ from the right.
    """
    if not centred:
        return times_inverse(cross), torch.zeros_like(error)
    step = times_inverse(cross - torch.outer(error, mean))
    return step, error - step @ mean


def _mix_outputs(moments: Moments) -> tuple[Tensor, Tensor]:
    """E[e xᵀ] [k, n] and E[e] [k] for k random sums of the errors; as they are where d is small.

    With the signs s in {−1, 1} [k, d] the expectation of sᵀs / k is the identity, so that inner
    products over the outputs keep their expectation. The signs are the same at each call.
    """
    cross, error = moments.of_errors()
    if len(error) <= _MIXED:
        return cross, error
    generator = torch.Generator(error.device).manual_seed(0)
    signs = torch.randint(2, (_MIXED, len(error)), generator=generator, device=error.device)
    mix = (2 * signs - 1).to(error) / _MIXED**0.5
    return mix @ cross, mix @ error
