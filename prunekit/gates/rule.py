"""The base of every rule: what a gate is, how it is drawn, and what it comes down to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit.gates.bounds import Bounds
from prunekit.gates.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What gates have come down to.

    Attributes:
        scores: group → float64 [num_units] on the CPU; low ones go.
        scales: group → float64 [num_units] on the CPU: what the consumers of a unit that stays are
            multiplied by; empty where gates are 0 or 1.
        updates: name of a weight → what is to be added to it, on the CPU: U [out, r] and
            V [r, in], of which it is the product, or itself; empty where weights were frozen.
    """

    scores: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    updates: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


class Rule(ABC):
    """What a gate is. All vectors are float32 [U], on the device of the layout.

    Args:
        layout: where the units of each group lie.
        bounds: what the choice must keep to.
        first: importances of the units to begin with; only their order counts.
        sublayers: have one more gate for each group that can lose all of its units.

    Attributes:
        parameters: the leaves that are trained, by name; those of units [U] first.
        extras: other tensors that steps change in place, by name.
        pins: −∞ for units that are gone, ∞ for those that must stay, 0 for all others [U].
        temperature: of the gates; that of each step is set before it.
        draws: how many uniform numbers a step takes: of units, then of groups [G] with `sublayers`.
    """

    parameters: dict[str, Tensor]
    extras: dict[str, Tensor]
    temperature: float = 1.0

    def __init__(
        self, layout: Layout, bounds: Bounds, first: Tensor, *, sublayers: bool = False
    ) -> None:
        self.layout, self.bounds, self.extras = layout, bounds, {}
        self.sublayers, self.pins = sublayers, pins_of(layout, bounds)
        self.draws = len(first) + (len(layout.sizes) if sublayers else 0)

    @abstractmethod
    def aim(self, progress: float) -> None:
        """Ask for a share in [0, 1] of the way from the dense model to the target from now on."""

    @abstractmethod
    def sample(self, uniform: Tensor, heat: float) -> Tensor:
        """The gates of a training step, differentiable.

        `uniform` [draws] is drawn from (0, 1) anew; `heat` falls from 1 at the first step to 0 at
        the last.
        """

    @abstractmethod
    def penalty(self) -> Tensor | None:
        """What is added to the loss of this step, differentiable; None where nothing is."""

    @abstractmethod
    def correct_gradients(self) -> None:
        """Change the gradients of the parameters after a backward pass, where need be."""

    @abstractmethod
    def chosen(self) -> Tensor:
        """The exact choice: 1 where units stay, 0 where they go."""

    @abstractmethod
    def settled(self) -> Tensor:
        """The gates as the cut would leave them: exactly 0 where units go."""

    def describe(self) -> str:
        """Where the budget stands, in a few words for the progress; empty where it is met."""
        return ""

    def check(self) -> None:  # noqa: B027
        """Raise ConfigError where the last step is too far from the target."""

    @abstractmethod
    def learned(self) -> Learned:
        """The scores and scales of the units."""


def pins_of(layout: Layout, bounds: Bounds) -> Tensor:
    """−∞ for units that are gone, ∞ for those that must stay, 0 for all others [U]."""
    pins = layout.join(dict.fromkeys(layout.names, 0.0))
    for name, own in layout.split(pins).items():
        for unit, value in bounds.pinned.get(name, {}).items():
            own[unit] = value
    return pins


def spread_order(layout: Layout, bounds: Bounds, first: Tensor) -> Tensor:
    """Logits in [-1, 1] in the order of first importances [U], evenly spread.

    The order is that of each group; where groups compete, it is that of all units, by importance
    for the price.
    """
    if not bounds.competing:
        sizes = torch.tensor(layout.sizes, device=layout.device)[layout.group_of]
        return (2 * layout.ranks(first) + 1) / sizes - 1
    worth = first / layout.join(bounds.prices)
    ranks = worth.argsort(stable=True).argsort()
    return (2 * ranks + 1) / len(ranks) - 1
