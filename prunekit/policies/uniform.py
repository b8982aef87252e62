"""The same share in every layer."""

from dataclasses import dataclass

from prunekit.policies.base import Policy


@dataclass(frozen=True)
class Uniform(Policy):
    """r_i = r."""

    def shares(self, depth: int) -> list[float]:
        """One for every layer."""
        return [1.0] * depth
