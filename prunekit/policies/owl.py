"""OWL (Yin et al. 2023, arXiv 2310.05175): layers with more outliers keep more.

An outlier is a weight with |w| ‖x‖₂ over M times the mean of its layer; D_l is the share of
outliers among the weights of layer l. With d_l = D_l scaled to [0, 1] over the layers:

    r_l = r (1 + spread (1 − 2 d_l)),    so that r_l lies in [r − λ, r + λ] with λ = r · spread.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from prunekit.calibration.activations import InputSums, gather_input_statistics
from prunekit.errors import ConfigError
from prunekit.importance.structures import scale_by_inputs
from prunekit.policies.base import Policy, Setting, expect_share, is_number

_LEAST = 1e-6  # a share of zero would leave the group out of the cut


@dataclass(frozen=True, kw_only=True)
class Owl(Policy):
    """Shares by outliers.

    Args:
        multiple: M, how many times the mean an outlier is at least.
        spread: λ / r, in [0, 1]: how far a share may be from the mean share, relative to it.
    """

    measures: ClassVar[bool] = True
    multiple: float = 5.0
    spread: float = 0.4

    def __post_init__(self) -> None:
        if not (is_number(self.multiple) and self.multiple > 0):
            raise ConfigError(f"policy.multiple: expected a number > 0, got {self.multiple!r}")
        expect_share("spread", self.spread)

    def group_shares(self, setting: Setting) -> dict[str, float]:
        """One forward pass over the calibration set; a group of no layer is a layer of its own."""
        keys = {g.name: g.name if g.layer is None else f"layer {g.layer}" for g in setting.groups}
        parameters: dict[str, set[str]] = defaultdict(set)
        for group in setting.groups:
            parameters[keys[group.name]] |= {member.parameter for member in group.members}
        names = set().union(*parameters.values()) - setting.graph.buffers
        inputs = gather_input_statistics(setting.model, names, setting.batches)
        outliers = {
            key: self._outlier_share(setting, inside & inputs.keys(), inputs)
            for key, inside in parameters.items()
        }
        setting.notes["outliers"] = outliers
        low, high = min(outliers.values()), max(outliers.values())
        scaled = {key: (share - low) / max(high - low, 1e-300) for key, share in outliers.items()}
        return {
            name: max(1 + self.spread * (1 - 2 * scaled[key]), _LEAST) for name, key in keys.items()
        }

    def _outlier_share(
        self, setting: Setting, names: set[str], inputs: Mapping[str, InputSums]
    ) -> float:
        """The share of outliers among the weights of a layer, given their names."""
        if not names:
            raise ConfigError("policy=owl: expected linear modules in every layer that is cut")
        products = [
            scale_by_inputs(setting.model, name, inputs[name].norm()) for name in sorted(names)
        ]
        size = sum(product.numel() for product in products)
        sums = torch.stack([product.double().sum() for product in products]).tolist()
        mean = sum(sums) / size
        over = torch.stack([(product > self.multiple * mean).sum() for product in products])
        return sum(over.tolist()) / size
