"""The number of parameters: the papers' Prune%."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunekit.allocation.costs.base import Cost, CostModel, CostSetting
from prunekit.allocation.costs.weights import weights_cost


@dataclass(frozen=True, kw_only=True)
class Parameters(CostModel):
    """Every parameter counts once, tied ones too, embeddings included. Exact for any plan."""

    name: ClassVar[str] = "parameters"
    counts_layers: ClassVar[bool] = True
    yields: ClassVar[bool] = True  # it is the default, and so no choice

    def measure(self, setting: CostSetting) -> Cost:
        """Read from the shapes alone; no weight is read."""
        return weights_cost(setting.graph)
