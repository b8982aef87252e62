"""Hard-concrete gates (Louizos et al. 2018, arXiv 1712.01312), and a Lagrangian for their cost.

s = σ((log u − log(1 − u) + log α) / β), z = min(1, max(0, s (ζ − γ) + γ)) with u uniform in (0, 1),
so that a gate is 0 or 1 with a probability above zero and has a gradient in between:

    P(z ≠ 0) = σ(log α − β log(−γ / ζ)),    without noise z = min(1, max(0, σ(log α) (ζ − γ) + γ)).

To the loss of a step comes λ₁ (c − t) + λ₂ (c − t)², c the expected cost that the gates leave as a
share of the dense cost, t the share that is asked for. Both λ rise by gradient ascent while c > t;
where the target is met, λ₁ halves in each step, or else it would press on for as long as it rose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunekit.errors import ConfigError
from prunekit.gates.bounds import Bounds
from prunekit.gates.layout import Layout
from prunekit.gates.rule import Learned, Rule, pins_of, spread_order

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
        temperature: β > 0.
        pressure: how fast the λ rise, a step, for a share of 1 too much.
        scale: whether units that stay keep the value of their gate.
    """

    def __init__(
        self,
        layout: Layout,
        bounds: Bounds,
        first: Tensor,
        *,
        temperature: float,
        pressure: float,
        scale: bool,
    ) -> None:
        super().__init__(layout, bounds, first)
        self.temperature, self.pressure, self.scale = temperature, pressure, scale
        self.log_alpha = (_START + spread_order(layout, bounds, first)).requires_grad_()
        self.parameters = {"log_alpha": self.log_alpha}
        self.pins = pins_of(layout, bounds)
        self.sizes = torch.tensor(layout.sizes, dtype=torch.float32, device=layout.device)
        count = 1 if bounds.share is not None else len(layout.sizes)
        self.target = torch.ones(count, device=layout.device)
        self.extras = {"linear": torch.zeros_like(self.target)}
        self.extras["square"] = torch.zeros_like(self.target)
        self.gone = torch.zeros_like(first)

    def aim(self, progress: float) -> None:
        """Ask for a share; the device is waited for once, where groups have their own."""
        scores = self.layout.split((self.log_alpha.detach() + self.pins).double().cpu())
        removed = self.bounds.solve(scores, progress) if progress > 0 else {}
        counts = {name: float(removed.get(name, 0)) for name in self.layout.names}
        self.gone = self.layout.join(counts)
        if self.bounds.share is not None:
            self.target.fill_(1 - progress * (1 - self.bounds.target))
        else:
            self.target.copy_(1 - torch.tensor(list(counts.values())).to(self.sizes) / self.sizes)

    def sample(self, uniform: Tensor, heat: float) -> Tensor:
        """Gates drawn anew; units that are gone or must stay have theirs."""
        drawn = draw(self.log_alpha, uniform, self.temperature)
        return torch.where(self.pins == 0, drawn, (self.pins > 0).to(drawn))

    def shares(self) -> Tensor:
        """What the gates leave on average, as a share of the cost [1], or of each group's units."""
        stays = expected(self.log_alpha, self.temperature)
        stays = torch.where(self.pins == 0, stays, (self.pins > 0).to(stays))
        kept = stays.new_zeros(len(self.sizes)).index_add(0, self.layout.group_of, stays)
        if self.bounds.share is not None:
            return self.bounds.share(self.sizes - kept).view(1)
        return kept / self.sizes

    def penalty(self) -> Tensor:
        """λ₁ (c − t) + λ₂ (c − t)², summed over the constraints; λ₁ and λ₂ move afterwards."""
        over = self.shares() - self.target
        linear, square = self.extras["linear"].clone(), self.extras["square"].clone()
        with torch.no_grad():
            risen = linear + self.pressure * over.detach()
            self.extras["linear"].copy_(torch.where(over > 0, risen, _RELEASE * linear))
            self.extras["square"].add_(self.pressure * over.detach().square())
        return (linear * over + square * over.square()).sum()

    def correct_gradients(self) -> None:
        """Nothing: the penalty keeps to the budget."""

    def settled(self) -> Tensor:
        """The exact choice by log α, with the values of what stays."""
        chosen = self.layout.keep_highest(self.log_alpha.detach() + self.pins, self.gone)
        return chosen * self._factors()

    def _factors(self) -> Tensor:
        if not self.scale:
            return torch.ones_like(self.pins)
        return torch.where(self.layout.foldable, value(self.log_alpha.detach()), 1.0)

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
        scores = self.layout.split(self.log_alpha.detach().double().cpu())
        scales = self.layout.split(self._factors().double().cpu()) if self.scale else {}
        return Learned(scores=scores, scales=scales)
