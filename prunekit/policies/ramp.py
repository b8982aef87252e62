"""Shares that grow or shrink with depth (SlimGPT, section 4.3, equation 6).

r_i = r_low + (r_high − r_low) · t_i over layers i = 0 … n−1:

log increase        t_i = log(i+1) / log(n)          SlimGPT's Incremental Pruning Ratio
linear increase     t_i = i / (n−1)
log decrease, linear decrease                        the same with the layers in reverse order
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from prunekit.policies.base import DepthPolicy, expect_share


@dataclass(frozen=True, kw_only=True)
class _Ramp(DepthPolicy, ABC):
    """A ramp from `low_share` to 1 over the depth, or back.

    `low_share`: r_low / r_high, in [0, 1]; SlimGPT's published command has 0.0625 / 0.25.
    """

    low_share: float = 0.25

    def __post_init__(self) -> None:
        expect_share("low_share", self.low_share)

    @abstractmethod
    def _position(self, i: int, depth: int) -> float:
        """t_i in [0, 1] of layer i of `depth` ≥ 2 layers."""

    def shares(self, depth: int) -> list[float]:
        """The ramp; its highest share is 1."""
        if depth == 1:
            return [1.0]
        rise = 1 - self.low_share
        return [self.low_share + rise * self._position(i, depth) for i in range(depth)]


class LogIncrease(_Ramp):
    """t_i = log(i+1) / log(n): early layers are spared, most of all the first few."""

    def _position(self, i: int, depth: int) -> float:
        return math.log(i + 1) / math.log(depth)


class LogDecrease(_Ramp):
    """t_i = log(n−i) / log(n): late layers are spared, most of all the last few."""

    def _position(self, i: int, depth: int) -> float:
        return math.log(depth - i) / math.log(depth)


class LinearIncrease(_Ramp):
    """t_i = i / (n−1): early layers are spared."""

    def _position(self, i: int, depth: int) -> float:
        return i / (depth - 1)


class LinearDecrease(_Ramp):
    """t_i = 1 − i / (n−1): late layers are spared."""

    def _position(self, i: int, depth: int) -> float:
        return 1 - i / (depth - 1)
