"""The base of the costs of one forward pass: how many tokens it is for."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

from torch import Tensor

from prunekit.allocation.costs.base import CostModel, CostSetting
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ForwardCost(CostModel, ABC):
    """What one forward pass costs, of `batch` rows of `tokens` token ids.

    A model that takes other inputs than token ids is given the first calibration batch as it is.
    """

    tokens: int = 64
    batch: int = 1

    def __post_init__(self) -> None:
        for key, value, least in (("tokens", self.tokens, 2), ("batch", self.batch, 1)):
            if type(value) is not int or value < least:
                raise ConfigError(f"cost.{key}: expected a whole number ≥ {least}, got {value}")

    @classmethod
    def for_target(cls, *, tokens: int, batch: int) -> ForwardCost:
        """The cost of a forward pass of the target's size."""
        return cls(tokens=tokens, batch=batch)

    def example(self, setting: CostSetting) -> Batch:
        """The keyword arguments of the forward pass that is counted."""
        first = setting.batches[0]
        ids = first.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return first
        repeats = -(-self.tokens // ids.shape[1])
        repeated = ids[:1].repeat(self.batch, repeats)[:, : self.tokens]
        options = {key: value for key, value in first.items() if not isinstance(value, Tensor)}
        return {**options, "input_ids": repeated}
