"""The same share in every layer."""

from dataclasses import dataclass

from prunekit.policies.base import DepthPolicy


@dataclass(frozen=True, kw_only=True)
class Uniform(DepthPolicy):
    """r_i = r for every layer i."""

    def shares(self, depth: int) -> list[float]:
        """One for every layer."""
        return [1.0] * depth
