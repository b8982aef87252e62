"""Straight-through gates: the exact choice of the budget in every step, trained by a sigmoid."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from prunekit.errors import ConfigError
from prunekit.gates import Bounds, Layout, StraightThroughRule
from prunekit.importance.learned import LearnedImportance


@dataclass(frozen=True, kw_only=True)
class StraightThrough(LearnedImportance):
    """The logits of gates that are 0 or 1 (`prunekit.gates.straight_through`).

    Args:
        noise: of the choice in training, beside logits that begin in [-1, 1]; it falls to 0.
        scale: whether each unit that stays also learns a factor.

    Raises:
        ConfigError: an option out of range.
    """

    noise: float = 0.3
    scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.noise, str) or not 0 <= self.noise < math.inf:
            raise ConfigError(f"importance.noise: expected a number ≥ 0, got {self.noise!r}")
        if not isinstance(self.scale, bool):
            raise ConfigError(f"importance.scale: expected true or false, got {self.scale!r}")

    def make_rule(self, layout: Layout, bounds: Bounds, first: Tensor) -> StraightThroughRule:
        """Straight-through gates with these options."""
        return StraightThroughRule(
            layout,
            bounds,
            first,
            noise=self.noise,
            scale=self.scale,
            sublayers=self.sublayers,
        )
