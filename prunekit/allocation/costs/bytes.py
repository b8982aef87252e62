"""The bytes of the stored weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunekit.allocation.costs.base import Cost, CostModel, CostSetting
from prunekit.allocation.costs.weights import weights_cost


@dataclass(frozen=True, kw_only=True)
class Bytes(CostModel):
    """What the parameters take in the type that they are stored in. Exact for any plan."""

    name: ClassVar[str] = "bytes"
    counts_layers: ClassVar[bool] = True

    def measure(self, setting: CostSetting) -> Cost:
        """Read from shapes and dtypes alone; no weight is read."""
        sizes = {
            name: (setting.stored or parameter.dtype).itemsize
            for name, parameter in setting.model.named_parameters()
        }
        return weights_cost(setting.graph, self.name, sizes)
