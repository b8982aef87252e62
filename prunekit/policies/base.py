"""What every ratio policy is: relative shares of the groups; only proportions count, the budget
scales them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from prunekit.allocation.costs.base import Cost
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import Importance


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a policy may look at: the `limit` is what `cost` must come down to once units of
    `groups` are gone.

    What a policy measures and a reader may want to see goes into `notes`, for the report.
    """

    model: nn.Module
    graph: CouplingGraph
    groups: Sequence[Group]
    batches: Sequence[Mapping[str, Any]]
    importance: Importance
    cost: Cost
    limit: float
    notes: dict[str, Any] = field(default_factory=dict)


class Policy(ABC):
    """How the pruning ratio is spread over a model; `measures`: it runs the model for that."""

    measures: ClassVar[bool] = False

    @abstractmethod
    def group_shares(self, setting: Setting) -> dict[str, float]:
        """Group name → relative share ≥ 0 of its units, not all zero. Raises ConfigError where it
        doesn't fit.
        """


class DepthPolicy(Policy):
    """A shape over the depth: a group takes the share of the layer it lies in."""

    @abstractmethod
    def shares(self, depth: int) -> list[float]:
        """`depth` relative shares ≥ 0, one a layer, not all zero. Raises ConfigError where it
        doesn't fit the depth.
        """

    def group_shares(self, setting: Setting) -> dict[str, float]:
        """By layer; groups of no layer take the mean share; where none has a layer, execution order
        is the depth.
        """
        layers = {group.layer for group in setting.graph.groups if group.layer is not None}
        inside = [group for group in setting.groups if group.layer is not None]
        if layers and (inside or any(group.spans_depth for group in setting.groups)):
            shares = self.shares(max(layers) + 1)
            mean = sum(shares) / len(shares)
            return {g.name: mean if g.layer is None else shares[g.layer] for g in setting.groups}
        shares = self.shares(len(setting.groups))
        return {group.name: share for group, share in zip(setting.groups, shares, strict=True)}
