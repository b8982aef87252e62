"""The same share in every layer."""

from dataclasses import dataclass

from prunekit.policies.base import DepthPolicy


@dataclass(frozen=True)
class Uniform(DepthPolicy):
    """r_i = r."""

    def shares(self, depth: int) -> list[float]:
        """One for every layer."""
        return [1.0] * depth
