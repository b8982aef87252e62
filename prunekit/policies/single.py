"""One layer alone: shows how much each layer matters (LLM-Pruner, figure 3)."""

from dataclasses import dataclass

from prunekit.errors import ConfigError
from prunekit.policies.base import DepthPolicy, expect_whole


@dataclass(frozen=True, kw_only=True)
class Single(DepthPolicy):
    """1 in layer `layer`, 0 elsewhere."""

    layer: int = 0

    def __post_init__(self) -> None:
        expect_whole("layer", self.layer)

    def shares(self, depth: int) -> list[float]:
        """One in the layer, zero elsewhere."""
        if not 0 <= self.layer < depth:
            raise ConfigError(f"policy.layer: expected a layer in [0, {depth}), got {self.layer}")
        return [float(i == self.layer) for i in range(depth)]
