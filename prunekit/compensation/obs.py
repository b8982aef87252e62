"""The compensation of SlimGPT (section 3): the columns that stay move to the least-squares optimum.

W ← W − W_S (A_SS)⁻¹ A_S: for the removed columns S, with A = (H + λI)⁻¹ of `prunekit.obs.inverse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from prunekit.calibration.observe import Site
from prunekit.calibration.statistics import Statistics
from prunekit.calibration.weighting import Tokens, Weighting
from prunekit.compensation.base import Compensation, Target
from prunekit.errors import ConfigError, expect_one_of
from prunekit.obs.inverse import remove_columns


@dataclass(frozen=True, kw_only=True)
class Obs(Compensation):
    """The least-squares optimum of the columns that stay.

    Args:
        target: what the consumers must reproduce from the inputs that the pruned layers before them
            give. pruned: what they compute on these inputs (SlimGPT); dense: what they compute in
            the dense model; residual: what brings back the dense residual stream behind them. The
            last two take a dense stream through the layers beside the pruned one.
        attention: the target of attention groups alone.
        mlp: the target of FFNs alone.
        bias: whether the biases of consumers that have one take up the mean of the loss.
        tokens: how much each token's error counts: equal, relative, clipped, without_first or
            gradient (`prunekit.calibration.weighting.Weighting`).
        clip_quantile: for clipped, the quantile of the tokens' norms.
        first_tokens: for without_first, how many tokens of each sample are left out.

    Raises:
        ConfigError: an unknown target, a `bias` that is neither true nor false, or token weights
            out of range.
    """

    target: Target = "residual"
    attention: Target | None = None
    mlp: Target | None = None
    bias: bool = False
    tokens: Tokens = "equal"
    clip_quantile: float = 0.99
    first_tokens: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.bias, bool):
            raise ConfigError(f"compensation.bias: expected true or false, got {self.bias!r}")
        known = list(get_args(Target))
        targets = {"target": self.target, "attention": self.attention, "mlp": self.mlp}
        for key, value in targets.items():
            inherited = value is None and key != "target"
            if not inherited:
                expect_one_of(f"compensation.{key}", value, known)
        self.weighting.check("compensation")

    @property
    def weighting(self) -> Weighting:
        """How tokens are weighed in the moments that consumers are repaired by."""
        return Weighting(
            tokens=self.tokens, clip_quantile=self.clip_quantile, first_tokens=self.first_tokens
        )

    def target_of(self, kind: str) -> Target:
        """The target of groups of this kind: their own, or the one of all groups."""
        own = {"attention": self.attention, "query_head": self.attention, "mlp": self.mlp}.get(kind)
        return own or self.target

    def centred(self, site: Site) -> bool:
        """Whether `bias` is asked for and all consumers of the site have a bias."""
        return self.bias and all(consumer.bias is not None for consumer in site.consumers)

    def repair(
        self, weight: Tensor, statistics: Statistics, removed: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """W − W_S (A_SS)⁻¹ A_S:, and for centred statistics the mean of the loss for the bias."""
        assert statistics.inverse is not None
        repaired = remove_columns(weight, statistics.inverse.matrix, removed)
        if not statistics.centred:
            return repaired, None
        bias = (weight.to(repaired) - repaired) @ statistics.moments.mean.to(repaired)
        return repaired, bias if statistics.shift is None else bias + statistics.shift.to(bias)
