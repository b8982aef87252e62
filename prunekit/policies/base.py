"""The base of every policy: relative shares of the groups, which the budget scales to its limit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeGuard

from torch import Tensor, nn

from prunekit.allocation.costs.base import Cost
from prunekit.allocation.scope import Scope
from prunekit.allocation.slots import Demands
from prunekit.calibration.store import Store
from prunekit.compensation.base import Compensation
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import Importance

Compute = Callable[[], dict[str, Any]]


class Keeper(Protocol):
    """Keeps tensors for a run that may be broken off; a name is FOLDER/NAME."""

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""

    def has_tensors(self, name: str) -> bool:
        """Whether tensors are kept under a name."""

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors that are kept under a name, on the CPU."""

    def drop_tensors(self, folder: str) -> None:
        """Let go of what is kept in a folder."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What a policy keeps tensors and unfinished results in.

    Attributes:
        open_store: given a name, opens a store for tensors between passes; an empty name is that of
            the run's activations.
        remember: given a name and a function, its result, or the one that a run kept before it was
            broken off; a small JSON object.
        keeper: keeps tensors as `remember` keeps JSON; None where a run keeps no state.
    """

    open_store: Callable[[str], Store] = field(default=lambda name: Store())
    remember: Callable[[str, Compute], dict[str, Any]] = field(
        default=lambda name, compute: compute()
    )
    keeper: Keeper | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a policy may look at.

    Args:
        model: the dense model, to be left as it is.
        graph: its groups.
        groups: those of them that may be cut.
        batches: the calibration set.
        importance: what will choose the units.
        cost: what counts.
        limit: what `cost` must come down to once units of `groups` are gone.
        scope: what the cut may touch, and how finely.
        demands: what the model itself demands of it.
        compensation: what will repair the weights that stay, if anything will.
        layerwise: units will be chosen layer by layer, where the importance can do that.
        damping: λ / mean(diag H) of the choice and of the repair.
        protected: group → units that must stay.
        seed: of everything that is drawn at random.
        tools: where the policy keeps tensors, and what it has finished.
        notes: a policy writes here what it measured and a reader of the report may want to see.
    """

    model: nn.Module
    graph: CouplingGraph
    groups: Sequence[Group]
    batches: Sequence[Batch]
    importance: Importance
    cost: Cost
    limit: float
    scope: Scope = field(default_factory=Scope)
    demands: Demands = field(default_factory=Demands)
    compensation: Compensation | None = None
    layerwise: bool = False
    damping: float = 0.0
    protected: Mapping[str, list[int]] = field(default_factory=dict)
    seed: int = 0
    tools: Tools = Tools()
    notes: dict[str, object] = field(default_factory=dict)


class Policy(ABC):
    """How a cut is spread over a model.

    Attributes:
        measures: the policy runs the model, so that its weights must be in memory.
        stands_in: where they are not, the policy has other shares to give.
        empties: the policy may take all units of a group, where `scope.min_units` is not set.
    """

    measures: ClassVar[bool] = False
    stands_in: ClassVar[bool] = False
    empties: ClassVar[bool] = False

    @abstractmethod
    def group_shares(self, setting: Setting) -> dict[str, float]:
        """Group name → share of its units, ≥ 0 and not all zero; only their proportions count.

        Raises:
            ConfigError: the policy does not fit the model or the importance.
        """


class DepthPolicy(Policy, ABC):
    """A shape over the depth: a group takes the share of the layer it lies in.

    Backends implement `shares`.
    """

    @abstractmethod
    def shares(self, depth: int) -> list[float]:
        """The shares of `depth` ≥ 1 layers, ≥ 0 and not all zero.

        Raises:
            ConfigError: the shape does not fit this depth.
        """

    def group_shares(self, setting: Setting) -> dict[str, float]:
        """Each group's share by its layer; see `spread_over_depth`."""
        return spread_over_depth(setting, self.shares)


def spread_over_depth(
    setting: Setting, shares_of: Callable[[int], Sequence[float]]
) -> dict[str, float]:
    """Each group's share by its layer; groups of no layer take the mean share of the layers.

    Where no group has a layer, the depth is that of the groups in execution order. `shares_of` a
    depth are the shares of so many layers.
    """
    layers = {group.layer for group in setting.graph.groups if group.layer is not None}
    inside = [group for group in setting.groups if group.layer is not None]
    if layers and (inside or any(group.spans_depth for group in setting.groups)):
        shares = shares_of(max(layers) + 1)
        mean = sum(shares) / len(shares)
        return {g.name: mean if g.layer is None else shares[g.layer] for g in setting.groups}
    shares = shares_of(len(setting.groups))
    return {group.name: share for group, share in zip(setting.groups, shares, strict=True)}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def expect_share(key: str, value: object) -> None:
    """Raise ConfigError where an option of a policy is no number in [0, 1]."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ConfigError(f"policy.{key}: expected a number in [0, 1], got {value!r}")


def expect_whole(key: str, value: object) -> None:
    """Raise ConfigError where an option of a policy is no whole number ≥ 0."""
    if not (type(value) is int and value >= 0):
        raise ConfigError(f"policy.{key}: expected a whole number ≥ 0, got {value!r}")
