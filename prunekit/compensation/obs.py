"""The compensation of SlimGPT: what stays moves to the least-squares optimum (section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from prunekit.calibration.observe import Site
from prunekit.calibration.statistics import Statistics
from prunekit.compensation.base import Compensation, Target
from prunekit.errors import ConfigError, suggest
from prunekit.obs.inverse import remove_columns


@dataclass(frozen=True, kw_only=True)
class Obs(Compensation):
    """The least-squares optimum of what stays.

    `target`: what the consumers must reproduce from the inputs that the pruned layers before them
    give. pruned: what they compute on these (SlimGPT); dense: what they compute in the dense model;
    residual: what brings back the dense residual stream behind them (both take a dense stream
    through the layers beside the pruned one). `attention`, `mlp`: the same for the groups of that
    kind alone. `bias`: where a consumer has a bias, it takes up the mean of what is lost.
    """

    target: Target = "residual"
    attention: Target | None = None
    mlp: Target | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bias, bool):
            raise ConfigError(f"compensation.bias: expected true or false, got {self.bias!r}")
        for key in ("target", "attention", "mlp"):
            value = getattr(self, key)
            if value not in (*get_args(Target), *([] if key == "target" else [None])):
                known = suggest(str(value), list(get_args(Target)))
                raise ConfigError(f"compensation.{key}: unknown {value!r}: {known}")

    def target_of(self, kind: str) -> Target:
        """The kind's own target, or that of all."""
        own = {"attention": self.attention, "query_head": self.attention, "mlp": self.mlp}.get(kind)
        return own or self.target

    def centred(self, site: Site) -> bool:
        """Where asked for, and all the site's consumers have a bias."""
        return self.bias and all(consumer.bias is not None for consumer in site.consumers)

    def repair(
        self, weight: Tensor, statistics: Statistics, removed: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """W − W_S (A_SS)⁻¹ A_S:."""
        repaired = remove_columns(weight, statistics.inverse.matrix, removed)
        if not statistics.centred:
            return repaired, None
        bias = (weight.to(repaired) - repaired) @ statistics.moments.mean.to(repaired)
        return repaired, bias if statistics.shift is None else bias + statistics.shift.to(bias)
