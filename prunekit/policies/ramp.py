"""Ratios that grow or shrink with depth (SlimGPT, section 4.3, equation 6)."""

import math
from abc import abstractmethod
from dataclasses import dataclass

from prunekit.errors import ConfigError
from prunekit.policies.base import DepthPolicy


@dataclass(frozen=True, kw_only=True)
class _Ramp(DepthPolicy):
    """r_i = low + (high − low)·t_i with low = `low_share`·high and t from 0 to 1 over the depth."""

    low_share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.low_share <= 1:
            raise ConfigError(
                f"policy.low_share: expected a number in [0, 1], got {self.low_share}"
            )

    @abstractmethod
    def _position(self, i: int, depth: int) -> float:
        """t_i in [0, 1]."""

    def shares(self, depth: int) -> list[float]:
        """The ramp, its highest share 1."""
        if depth == 1:
            return [1.0]
        return [
            self.low_share + (1 - self.low_share) * self._position(i, depth) for i in range(depth)
        ]


class LogIncrease(_Ramp):
    """t_i = log(i+1) / log(n): SlimGPT's Incremental Pruning Ratio."""

    def _position(self, i: int, depth: int) -> float:
        return math.log(i + 1) / math.log(depth)


class LogDecrease(_Ramp):
    """The logarithmic ramp, last layer first."""

    def _position(self, i: int, depth: int) -> float:
        return math.log(depth - i) / math.log(depth)


class LinearIncrease(_Ramp):
    """t_i = i / (n−1)."""

    def _position(self, i: int, depth: int) -> float:
        return i / (depth - 1)


class LinearDecrease(_Ramp):
    """The linear ramp, last layer first."""

    def _position(self, i: int, depth: int) -> float:
        return 1 - i / (depth - 1)
