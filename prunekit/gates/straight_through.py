"""Straight-through gates: forward the exact choice of the budget, backward a sigmoid.

z_u = 1 where the logit θ_u is among those that the budget keeps, else 0; ∂z_u/∂θ_u is taken to be
σ'(θ_u / τ) / τ, τ the temperature. Of the gradient, the part along the gradient of the cost is left
out: a step along it would raise or lower all logits that compete by their prices, which changes
nothing in a choice whose cost is given. With noise, the choice of a training step is that of
θ_u + ε ln(v / (1 − v)), v uniform in (0, 1) and ε falling to 0: it looks at what is beside the best
choice so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.gates.bounds import Bounds
from prunekit.gates.layout import Layout
from prunekit.gates.rule import Learned, Rule, spread_order


class StraightThroughRule(Rule):
    """Gates that are 0 or 1 in every forward pass, as the budget's exact choice of logits says.

    Args:
        layout: as for every rule.
        bounds: as for every rule.
        first: as for every rule.
        noise: of the choice, times a logistic number; it cools down to 0.
        scale: learn a factor for each unit that stays, beside the choice.
        sublayers: as for every rule; the logit of such a gate is added to those of its units.
    """

    def __init__(
        self,
        layout: Layout,
        bounds: Bounds,
        first: Tensor,
        *,
        noise: float,
        scale: bool,
        sublayers: bool = False,
    ) -> None:
        super().__init__(layout, bounds, first, sublayers=sublayers)
        self.noise = noise
        self.logits = spread_order(layout, bounds, first).requires_grad_()
        self.scale = torch.ones_like(first).requires_grad_(scale)
        self.parameters = {"logits": self.logits} | ({"scale": self.scale} if scale else {})
        self.wholes = first.new_zeros(len(layout.sizes)).requires_grad_(sublayers)
        self.parameters |= {"wholes": self.wholes} if sublayers else {}
        self.prices = layout.join(bounds.prices)
        self.mask = torch.ones_like(first)
        self.gone = torch.zeros_like(first)

    def aim(self, progress: float) -> None:
        """Settle how many units of each group go; the device is waited for once."""
        scores = {
            name: own.double() for name, own in self.layout.split(self._scores().cpu()).items()
        }
        removed = self.bounds.solve(scores, progress) if progress > 0 else {}
        self.gone = self.layout.join({n: float(removed.get(n, 0)) for n in self.layout.names})

    def _sums(self) -> Tensor:
        """The logits of units, with that of their sublayer where it has one [U]."""
        if not self.sublayers:
            return self.logits
        wholes = torch.where(self.layout.leaving, self.wholes, 0.0)
        return self.logits + wholes[self.layout.group_of]

    def _scores(self) -> Tensor:
        return self._sums().detach() + self.pins

    def _choose(self, noise: Tensor | float) -> Tensor:
        return self.layout.keep_highest(self._scores() + noise, self.gone)

    def sample(self, uniform: Tensor, heat: float) -> Tensor:
        """The exact choice; its value is not changed by what leads gradients to the logits."""
        noise = torch.logit(uniform)
        if self.sublayers:
            units, groups = noise.split([len(self.mask), len(self.wholes)])
            noise = units + torch.where(self.layout.leaving, groups, 0.0)[self.layout.group_of]
        self.mask = self._choose(self.noise * heat * noise if self.noise else 0.0)
        soft = torch.sigmoid(self._sums() / self.temperature)
        return (self.mask + (soft - soft.detach())) * self._factors()

    def _factors(self) -> Tensor:
        """The factor of each unit: 1 where weights can't take one."""
        return torch.where(self.layout.foldable, self.scale, torch.ones_like(self.scale))

    def penalty(self) -> None:
        """None: the choice keeps to the budget by itself."""

    def correct_gradients(self) -> None:
        """Project the gradients of logits onto the choices of equal cost."""
        gradient = self.logits.grad
        assert gradient is not None
        if self.bounds.competing:
            _leave_out(gradient, self.prices)
        else:
            gradient.sub_(self.layout.mean(gradient))
        if self.wholes.grad is not None:
            prices = torch.zeros_like(self.wholes).index_add(0, self.layout.group_of, self.prices)
            _leave_out(self.wholes.grad, torch.where(self.layout.leaving, prices, 0.0))

    def chosen(self) -> Tensor:
        """The highest logits of each group, as many as the budget keeps."""
        return self._choose(0.0)

    def settled(self) -> Tensor:
        """The exact choice, with the scales of what stays."""
        return self.chosen() * self._factors().detach()

    def learned(self) -> Learned:
        """Scores are logits; scales are those that were learned."""
        scores = self.layout.split(self._sums().detach().double().cpu())
        if "scale" not in self.parameters:
            return Learned(scores=scores, scales={})
        scales = self.layout.split(self._factors().detach().double().cpu())
        return Learned(scores=scores, scales=scales)


def _leave_out(gradient: Tensor, prices: Tensor) -> None:
    """Take the part along the prices out of a gradient, in place."""
    length = prices.square().sum().clamp_min(torch.finfo(prices.dtype).tiny)
    gradient.sub_((gradient * prices).sum() / length * prices)
