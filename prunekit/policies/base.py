"""What every ratio policy is: relative shares over the depth of a model."""

from abc import ABC, abstractmethod


class Policy(ABC):
    """The shape of the pruning ratio over depth; only proportions count, the budget solver scales them."""

    @abstractmethod
    def shares(self, depth: int) -> list[float]:
        """`depth` relative shares ≥ 0, one a layer, not all zero. Raises ConfigError where it doesn't fit the depth."""
