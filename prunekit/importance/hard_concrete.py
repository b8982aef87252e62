"""Hard-concrete gates (L0): drawn in training, led to the budget by a Lagrangian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from prunekit.errors import ConfigError, expect_one_of
from prunekit.gates import Bounds, HardConcreteRule, Layout
from prunekit.gates.hard_concrete import Multiplier
from prunekit.importance.learned import LearnedImportance


@dataclass(frozen=True, kw_only=True)
class HardConcrete(LearnedImportance):
    """The log α of hard-concrete gates (`prunekit.gates.hard_concrete`).

    Args:
        pressure: how fast the multipliers of the budget rise.
        scale: whether units that stay keep the value of their gate, as a factor in the weights.
        multiplier: "ascent": the multipliers rise from step to step; "balanced": those of each step
            alone, so that the loss moves gates against each other and not all one way.

    Raises:
        ConfigError: an option out of range.
    """

    pressure: float = 5.0
    scale: bool = True
    multiplier: Multiplier = "ascent"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.pressure, str) or not 0 < self.pressure < math.inf:
            raise ConfigError(f"importance.pressure: expected a number > 0, got {self.pressure!r}")
        expect_one_of("importance.multiplier", self.multiplier, get_args(Multiplier))
        if not isinstance(self.scale, bool):
            raise ConfigError(f"importance.scale: expected true or false, got {self.scale!r}")

    def make_rule(self, layout: Layout, bounds: Bounds, first: Tensor) -> HardConcreteRule:
        """Hard-concrete gates with these options."""
        return HardConcreteRule(
            layout,
            bounds,
            first,
            pressure=self.pressure,
            scale=self.scale,
            sublayers=self.sublayers,
            multiplier=self.multiplier,
        )
