"""Shares written down by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from prunekit.errors import ConfigError
from prunekit.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Manual(Policy):
    """One number ≥ 0 per layer; their proportions hold, their scale is set by the target."""

    values: Sequence[float] = field(default_factory=list)

    def shares(self, depth: int) -> list[float]:
        """The list as given."""
        values = [float(value) for value in self.values]
        if len(values) != depth:
            raise ConfigError(f"policy.values: expected {depth} numbers, one a layer, got {len(values)}")
        if min(values) < 0 or max(values) == 0:
            raise ConfigError(f"policy.values: expected numbers ≥ 0, not all zero, got {values}")
        return values
