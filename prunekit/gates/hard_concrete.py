"""Hard-concrete gates (Louizos et al. 2018, arXiv 1712.01312), and a Lagrangian for their cost.

s = σ((log u − log(1 − u) + log α) / β), z = min(1, max(0, s (ζ − γ) + γ)) with u uniform in (0, 1),
so that a gate is 0 or 1 with a probability above zero and has a gradient in between:

    P(z ≠ 0) = σ(log α − β log(−γ / ζ)),    without noise z = min(1, max(0, σ(log α) (ζ − γ) + γ)).

To the loss of a step comes λ₁ (c − t) + λ₂ (c − t)², c the expected cost that the gates leave as a
share of the dense cost, t the share that is asked for. Both λ rise by gradient ascent while c > t;
where the target is met, λ₁ halves in each step, or else it would press on for as long as it rose.

That is gradient ascent. Balanced multipliers are those of each step alone: λ₁ = −⟨∇L, ∇c⟩/⟨∇c, ∇c⟩,
which takes out of the loss's gradient what would change the cost, so that gates move against each
other instead of all one way, and λ₂ (c − t) with λ₂ in the size of the loss's gradient, which goes
back to the target. Neither depends on how large the loss is.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prunekit.errors import ConfigError
from prunekit.gates.bounds import Bounds
from prunekit.gates.layout import Layout
from prunekit.gates.rule import Learned, Rule, spread_order

Multiplier = Literal["ascent", "balanced"]
LOW, HIGH = -0.1, 1.1  # γ and ζ, what s is stretched to
_RELEASE = 0.5  # what is left of λ₁ after a step in which the target was met
_START = 2.0  # log α of a unit of middle importance: it stays with a probability of 0.97
# Of the way to the target, and of all, so much may be missing: the solver goes the rest.
_MISSING_WAY, _MISSING = 0.1, 0.02


def draw(log_alpha: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Gates z for uniform numbers in (0, 1); any shape."""
    noise = uniform.log() - (1 - uniform).log()
    return _stretch(torch.sigmoid((noise + log_alpha) / temperature))


def expected(log_alpha: Tensor, temperature: float) -> Tensor:
    """P(z ≠ 0); any shape."""
    return torch.sigmoid(log_alpha - temperature * math.log(-LOW / HIGH))


def value(log_alpha: Tensor) -> Tensor:
    """The gate without noise; any shape."""
    return _stretch(torch.sigmoid(log_alpha))


def _stretch(s: Tensor) -> Tensor:
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


class HardConcreteRule(Rule):
    """Gates that are drawn in training; what they leave on average is led to the target.

    Where units of the whole model compete, one constraint is on the cost; else one for each group
    is on the share of its units that stays.

    Args:
        layout: as for every rule.
        bounds: as for every rule.
        first: as for every rule.
        pressure: how fast the λ rise, a step, for a share of 1 too much.
        scale: whether units that stay keep the value of their gate.
        sublayers: as for every rule; such a gate is multiplied by those of its units.
        multiplier: ascent, or balanced: how the multipliers are found.
    """

    temperature = 2 / 3  # β

    def __init__(
        self,
        layout: Layout,
        bounds: Bounds,
        first: Tensor,
        *,
        pressure: float,
        scale: bool,
        sublayers: bool = False,
        multiplier: Multiplier = "ascent",
    ) -> None:
        super().__init__(layout, bounds, first, sublayers=sublayers)
        self.multiplier = multiplier
        self.pressure, self.scale = pressure, scale
        self.log_alpha = (_START + spread_order(layout, bounds, first)).requires_grad_()
        self.parameters = {"log_alpha": self.log_alpha}
        self.wholes = first.new_full([len(layout.sizes)], _START).requires_grad_(sublayers)
        self.parameters |= {"wholes": self.wholes} if sublayers else {}
        self.sizes = torch.tensor(layout.sizes, dtype=torch.float32, device=layout.device)
        count = 1 if bounds.share is not None else len(layout.sizes)
        self.target = torch.ones(count, device=layout.device)
        self.extras = {"linear": torch.zeros_like(self.target)}
        self.extras["square"] = torch.zeros_like(self.target)
        self.gone = torch.zeros_like(first)

    def aim(self, progress: float) -> None:
        """Ask for a share; the device is waited for once, where groups have their own."""
        scores = self.layout.split((self._scores() + self.pins).double().cpu())
        removed = self.bounds.solve(scores, progress) if progress > 0 else {}
        counts = {name: float(removed.get(name, 0)) for name in self.layout.names}
        self.gone = self.layout.join(counts)
        if self.bounds.share is not None:
            self.target.fill_(1 - progress * (1 - self.bounds.target))
        else:
            self.target.copy_(1 - torch.tensor(list(counts.values())).to(self.sizes) / self.sizes)

    def sample(self, uniform: Tensor, heat: float) -> Tensor:
        """Gates drawn anew; units that are gone or must stay have theirs."""
        count = len(self.log_alpha)
        drawn = draw(self.log_alpha, uniform[:count], self.temperature)
        if self.sublayers:
            drawn = drawn * self._of_units(draw(self.wholes, uniform[count:], self.temperature))
        return torch.where(self.pins == 0, drawn, (self.pins > 0).to(drawn))

    def shares(self) -> Tensor:
        """What the gates leave on average, as a share of the cost [1], or of each group's units."""
        stays = expected(self.log_alpha, self.temperature)
        if self.sublayers:
            stays = stays * self._of_units(expected(self.wholes, self.temperature))
        stays = torch.where(self.pins == 0, stays, (self.pins > 0).to(stays))
        kept = stays.new_zeros(len(self.sizes)).index_add(0, self.layout.group_of, stays)
        if self.bounds.share is not None:
            return self.bounds.share(self.sizes - kept).view(1)
        return kept / self.sizes

    def penalty(self) -> Tensor | None:
        """λ₁ (c − t) + λ₂ (c − t)², summed over the constraints; λ₁ and λ₂ move afterwards."""
        if self.multiplier == "balanced":
            return None
        over = self.shares() - self.target
        linear, square = self.extras["linear"].clone(), self.extras["square"].clone()
        with torch.no_grad():
            risen = linear + self.pressure * over.detach()
            self.extras["linear"].copy_(torch.where(over > 0, risen, _RELEASE * linear))
            self.extras["square"].add_(self.pressure * over.detach().square())
        return (linear * over + square * over.square()).sum()

    def correct_gradients(self) -> None:
        """Balanced multipliers: the loss moves gates along the budget, what is missing across it.

        Of several constraints, each has gates of its own.
        """
        if self.multiplier == "ascent":
            return
        leaves, shares = list(self.parameters.values()), self.shares()
        prices = torch.cat(torch.autograd.grad(shares.sum(), leaves))
        gradient = torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None])
        groups = [self.layout.group_of, torch.arange(len(self.sizes), device=self.layout.device)]
        owner = torch.cat(groups)[: len(prices)]
        if self.bounds.share is not None:
            owner = torch.zeros_like(owner)

        def sums(values: Tensor) -> Tensor:
            return torch.zeros_like(self.target).index_add(0, owner, values)

        length = sums(prices.square()).clamp_min(torch.finfo(prices.dtype).tiny)
        size = (sums(gradient.square()) / length).sqrt()
        linear = -sums(gradient * prices) / length
        square = self.pressure * size * (shares.detach() - self.target)
        gradient += (linear + square)[owner] * prices
        for leaf, part in zip(leaves, gradient.split([len(leaf) for leaf in leaves]), strict=True):
            leaf.grad = part

    def chosen(self) -> Tensor:
        """The highest log α of each group, as many as the budget keeps."""
        return self.layout.keep_highest(self._scores() + self.pins, self.gone)

    def settled(self) -> Tensor:
        """The exact choice by log α, with the values of what stays."""
        return self.chosen() * self._factors()

    def _factors(self) -> Tensor:
        if not self.scale:
            return torch.ones_like(self.pins)
        values = value(self.log_alpha.detach())
        if self.sublayers:
            values = values * self._of_units(value(self.wholes.detach()))
        return torch.where(self.layout.foldable, values, 1.0)

    def _of_units(self, wholes: Tensor) -> Tensor:
        """The gates of sublayers [G], each for all units of its group [U]; 1 where it has none."""
        return torch.where(self.layout.leaving, wholes, 1.0)[self.layout.group_of]

    def _scores(self) -> Tensor:
        """For each unit log α [U]; beside a sublayer's gate, of one that stays as often as both."""
        own = self.log_alpha.detach()
        if not self.sublayers:
            return own
        shift = self.temperature * math.log(-LOW / HIGH)
        wholes = torch.where(self.layout.leaving, self.wholes.detach(), math.inf)
        logs = F.logsigmoid(own - shift) + F.logsigmoid(wholes - shift)[self.layout.group_of]
        return logs - torch.log(-torch.expm1(logs)) + shift

    def describe(self) -> str:
        """The share that stays on average, and the one that is asked for."""
        left, target = self.shares().detach().mean().item(), self.target.mean().item()
        return f", {left:.1%} left on average, {target:.1%} asked for"

    def check(self) -> None:
        """Raise ConfigError where the gates have not come near their target."""
        left, target = self.shares().detach().mean().item(), self.target.mean().item()
        if left - target > _MISSING_WAY * (1 - target) + _MISSING:
            raise ConfigError(
                f"importance=hard_concrete: gates came down to {left:.1%} of what they may leave "
                f"at most {target:.1%} of: raise importance.pressure, importance.train.steps or "
                ".learning_rate, or lower .reach"
            )

    def learned(self) -> Learned:
        """Scores are log α; scales are the values of gates without noise."""
        scores = self.layout.split(self._scores().double().cpu())
        scales = self.layout.split(self._factors().double().cpu()) if self.scale else {}
        return Learned(scores=scores, scales=scales)
