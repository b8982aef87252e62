"""The policy of LLM-Pruner: the first and the last layers are spared.

r_i = r for start ≤ i < end, and 0 outside: the paper cuts layers [4, 30) of 32.
"""

import math
from dataclasses import dataclass

from prunekit.errors import ConfigError
from prunekit.policies.base import DepthPolicy, expect_whole


@dataclass(frozen=True, kw_only=True)
class Window(DepthPolicy):
    """1 inside layers [start, end) of a model of `reference_depth` layers, 0 outside.

    Both ends scale with the depth of the model. The number of spared layers at each end is rounded
    up, so that one is spared wherever the reference spares some.
    """

    start: int = 4
    end: int = 30
    reference_depth: int = 32

    def __post_init__(self) -> None:
        for key in ("start", "end", "reference_depth"):
            expect_whole(key, getattr(self, key))
        if not 0 <= self.start < self.end <= self.reference_depth:
            raise ConfigError(
                "policy.window: expected 0 ≤ start < end ≤ reference_depth, got "
                f"start={self.start}, end={self.end}, reference_depth={self.reference_depth}"
            )

    def shares(self, depth: int) -> list[float]:
        """One inside the scaled window, zero outside."""
        first = math.ceil(self.start * depth / self.reference_depth)
        last = math.ceil((self.reference_depth - self.end) * depth / self.reference_depth)
        if first + last >= depth:
            raise ConfigError(
                f"policy.window: spares {first} + {last} layers of a model that has {depth}; use "
                "uniform"
            )
        return [float(first <= i < depth - last) for i in range(depth)]
