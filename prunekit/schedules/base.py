"""Who is chosen when: all units at once from the dense model, or layer by layer on the already
pruned prefix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prunekit.allocation.budget import Budget
from prunekit.calibration.store import Store
from prunekit.calibration.stream import Layers
from prunekit.compensation.base import Compensation
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import Importance
from prunekit.plan import PruningPlan
from prunekit.schedules.state import State


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a schedule works on; `protected` names the units of a group that must stay.

    `rounds`: score, remove a part, score again. `independent`: every matrix loses units of its own
    choice. `state`: keeps what is finished; `store`: where activations wait; `layers`: where
    layers' weights come from and, given the units removed so far, go to.
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
    layers: Callable[[Mapping[str, list[int]]], Layers] | None = None

    def remembered(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` gives, or gave before the run was broken off."""
        return (
            self.state.remember(name, compute) if self.state and not self.independent else compute()
        )


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Chooses the units, and leaves repaired consumers (their removed columns zero) where there is
    a compensation.

    `damping`: λ / mean(diag H) to start with; raised where the factorisation needs it.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.damping, str) or not 0 <= self.damping < math.inf:
            raise ConfigError(f"schedule.damping: expected a number ≥ 0, got {self.damping}")

    @abstractmethod
    def run(self, task: Assignment) -> PruningPlan:
        """The plan; the model's shapes are unchanged, its consumers may be repaired."""
