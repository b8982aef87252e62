"""OWL (Yin et al. 2023, arXiv 2310.05175): layers whose weights meet more outlying activations keep
more.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

from prunekit.calibration.activations import gather_input_statistics
from prunekit.errors import ConfigError
from prunekit.importance.structures import scale_by_inputs
from prunekit.policies.base import Policy, Setting


@dataclass(frozen=True, kw_only=True)
class Owl(Policy):
    """r_l = r (1 + spread (1 − 2 d_l)), d_l the layer's share of outliers scaled to [0, 1] over the
    layers.

    An outlier is a weight with |w| ‖x‖₂ over `multiple` times its layer's mean (equation 2; its λ
    is r · spread).
    """

    measures: ClassVar[bool] = True
    multiple: float = 5.0
    spread: float = 0.4

    def __post_init__(self) -> None:
        if not self.multiple > 0:
            raise ConfigError(f"policy.multiple: expected a number > 0, got {self.multiple}")
        if not 0 <= self.spread <= 1:
            raise ConfigError(f"policy.spread: expected a number in [0, 1], got {self.spread}")

    def group_shares(self, setting: Setting) -> dict[str, float]:
        """One forward pass over the calibration set; a group of no layer counts as one."""
        keys = {g.name: g.name if g.layer is None else f"layer {g.layer}" for g in setting.groups}
        places: dict[str, set[str]] = defaultdict(set)
        for group in setting.groups:
            places[keys[group.name]] |= {member.parameter for member in group.members}
        inputs = gather_input_statistics(
            setting.model, set().union(*places.values()) - setting.graph.buffers, setting.batches
        )
        shares = {
            key: self._outliers(setting, names & inputs.keys(), inputs)
            for key, names in places.items()
        }
        setting.notes["outliers"] = shares
        low, high = min(shares.values()), max(shares.values())
        scaled = {key: (share - low) / max(high - low, 1e-300) for key, share in shares.items()}
        return {
            name: max(1 + self.spread * (1 - 2 * scaled[key]), 1e-6) for name, key in keys.items()
        }

    def _outliers(self, setting: Setting, names: set[str], inputs: dict) -> float:
        if not names:
            raise ConfigError("policy=owl: expected linear modules in every layer that is cut")
        found = [
            scale_by_inputs(setting.model, name, inputs[name].norm()) for name in sorted(names)
        ]
        size = sum(p.numel() for p in found)
        mean = sum(p.double().sum().item() for p in found) / size
        return sum(int((p > self.multiple * mean).sum()) for p in found) / size
