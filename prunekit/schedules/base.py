"""Schedules: when units are chosen, all at once on the dense model or layer by layer.

Layer by layer means that each layer is given the outputs of the pruned layers before it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from prunekit.allocation.budget import Budget
from prunekit.calibration.layers import Layers
from prunekit.calibration.store import Store
from prunekit.compensation.base import Compensation
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import Importance
from prunekit.plan import PruningPlan
from prunekit.schedules.state import State
from prunekit.surgery.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The work of a schedule: a model, the groups to cut, how much of them, and by which methods.

    `rounds`: how many times the units are scored; each time a part of them is chosen.
    `protected`: group name → units that must stay.
    `independent`: every matrix loses units of its own choice (`prunekit.schedules.independent`).
    `state`: keeps the groups that are finished on disk. `store`: keeps activations between two
    layers. `layers`: reads the layers of a streamed model, cuts and writes them; None where the
    whole model is in memory. `snapshot`: keeps a group's weights before they change; None where
    nobody puts them back. `float64`: group name → how many of its Hessians took float64 to invert;
    groups with none are left out. `adapters`: linear module → U [out, r] and V [r, in] as the cut
    leaves them, of an update that its weight holds and a recovery goes on with. The schedule fills
    both in.
    """

    model: nn.Module
    graph: CouplingGraph
    groups: Sequence[Group]
    budget: Budget
    batches: Sequence[Batch]
    importance: Importance
    compensation: Compensation | None
    rounds: int = 1
    protected: Mapping[str, list[int]] = field(default_factory=dict)
    independent: bool = False
    state: State | None = None
    store: Store | None = None
    layers: Layers | None = None
    snapshot: Snapshot | None = None
    float64: dict[str, int] = field(default_factory=dict)
    adapters: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)

    def remember(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `compute`, or the result that a run kept before it was broken off.

        With `independent`, nothing is kept: the weights that are moved are no part of the state.
        """
        if self.state is None or self.independent:
            return compute()
        return self.state.remember(name, compute)


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Chooses the units to remove, and has the consumers repaired where there is a compensation.

    Args:
        damping: λ / mean(diag H) to start with, raised where the factorisation needs more.

    Raises:
        ConfigError: `damping` is negative, infinite or no number.
    """

    # Whether the consumers change group by group, so that every group needs linear consumers.
    layerwise: ClassVar[bool] = False

    damping: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.damping, str) or not 0 <= self.damping < math.inf:
            raise ConfigError(f"schedule.damping: expected a number ≥ 0, got {self.damping!r}")

    def check(self, importance: Importance, rounds: int, independent: bool) -> None:  # noqa: B027
        """Refuse options that the schedule can't act on with this importance, before any work.

        Args:
            importance: what chooses the units.
            rounds: how many times they are scored.
            independent: every matrix loses units of its own choice.

        Raises:
            ConfigError: such an option; the message says what would do.
        """

    @abstractmethod
    def run(self, assignment: Assignment) -> PruningPlan:
        """Choose the units; the removed columns of consumers that were repaired are zero.

        The shapes of the model do not change.
        """
