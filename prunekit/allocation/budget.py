"""The budget: how many whole units each group loses so that the model costs what it may.

A policy's shares are scaled (`shares`), or everything is ranked together (`ranking`), until the
cost is met; then single steps are moved while that comes nearer (`polish`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from prunekit.allocation.costs.base import Cost
from prunekit.allocation.polish import polish
from prunekit.allocation.ranking import rank_in_layers, rank_slots
from prunekit.allocation.scope import Ranking
from prunekit.allocation.shares import follow_shares
from prunekit.allocation.slots import Slot
from prunekit.errors import ConfigError
from prunekit.graph import Group

Steps = dict[str, int]  # name of a slot → which of its steps it is at


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limit that a cost must come down to, and the slots that may be cut for it.

    Args:
        slots: what is cut; their steps are what the budget counts in.
        cost: what counts; it never rises as units go.
        limit: what the cost must come down to, within half the cheapest step.
        ranking: which units compete: of a group (local), of a layer, or of the model.
        comparable: scores of groups compare as they are, instead of per unit of cost.
        key: the option that sets the limit, for messages.
        hint: the options that narrow what can go, for messages.
        asked: group → how many of its units go, where that is given; the limit then is their cost.

    Raises:
        ConfigError: the dense model meets the limit, or nothing that may be cut can meet it.
    """

    slots: Sequence[Slot]
    cost: Cost
    limit: float
    ranking: Ranking = "local"
    comparable: bool = False
    key: str = "ratio"
    hint: str = ""
    asked: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.asked is not None:
            return
        dense, least = self.cost({}), self.cost_of(self.last_steps)
        cheapest = min(self.step_costs.values(), default=0.0)
        unit = self.cost.unit or self.cost.name
        if self.limit >= dense:
            raise ConfigError(
                f"{self.key}: expected less than the dense model's {_format(dense)} {unit}, got "
                f"{_format(self.limit)}"
            )
        if self.limit < least - cheapest / 2:
            most = math.floor((1 - least / dense) * 10_000) / 10_000
            asked = f"{1 - self.limit / dense:.4g}" if self.key == "ratio" else _format(self.limit)
            raise ConfigError(
                f"{self.key}: {asked} of {_format(dense)} {unit} is out of reach: this policy and "
                f"scope can remove at most {most:.4g} of them, which leaves {_format(least)}"
                f"{self.hint}"
            )

    def counts(self, steps: Mapping[str, float]) -> dict[str, float]:
        """Group → units removed from it at these steps of the slots, interpolated between steps."""
        counts: dict[str, float] = {}
        for slot in self.slots:
            at = steps.get(slot.name, 0)
            low = min(math.floor(at), max(len(slot.removed) - 2, 0))
            high = min(low + 1, len(slot.removed) - 1)
            units = slot.removed[low] + (slot.removed[high] - slot.removed[low]) * (at - low)
            counts |= slot.counts(units)
        return counts

    def cost_of(self, steps: Mapping[str, float]) -> float:
        """The cost at these steps of the slots."""
        return self.cost(self.counts(steps))

    @cached_property
    def step_costs(self) -> dict[str, float]:
        """Slot → the cost that its last step saves, while the other slots are whole.

        Slots without a step, or whose steps save nothing, are left out.
        """
        dense = self.cost({})
        costs = {}
        for slot in self.slots:
            if len(slot.removed) > 1:
                units = slot.removed[-1] - slot.removed[-2]
                gain = dense - self.cost(slot.counts(slot.removed[-1]))
                costs[slot.name] = gain / slot.removed[-1] * units
        return {name: cost for name, cost in costs.items() if cost > 0}

    @cached_property
    def prices(self) -> dict[str, float]:
        """Group → the cost that one of its units saves, while the other groups are whole."""
        return {
            group.name: (self.cost({}) - self.cost({group.name: group.num_units})) / group.num_units
            for slot in self.slots
            for group in slot.groups
        }

    @cached_property
    def last_steps(self) -> Steps:
        """Slot → its last step."""
        return {slot.name: len(slot.removed) - 1 for slot in self.slots}

    def solve(
        self, scores: Mapping[str, Tensor] | None = None, progress: float = 1.0
    ) -> dict[str, int]:
        """How many units each group loses.

        Args:
            scores: group → scores of its units [num_units]; needed where groups compete.
            progress: in (0, 1]: go only this share of the way to the limit.
        """
        if self.asked is not None:
            return {name: round(count * progress) for name, count in self.asked.items()}
        dense = self.cost({})
        limit = dense - (dense - self.limit) * progress
        slots = [slot for slot in self.slots if slot.name in self.step_costs]
        if self.ranking == "model":
            assert scores is not None
            steps = rank_slots(self, slots, scores, limit, {})
        else:
            steps = follow_shares(self, limit)
        if self.ranking == "layer":
            assert scores is not None
            steps = rank_in_layers(self, slots, scores, steps)
        steps = polish(self, steps, limit)
        return {name: round(count) for name, count in self.counts(steps).items()}


def pick_lowest(
    groups: Sequence[Group], scores: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, list[int]]:
    """Group → its `counts` units with the lowest scores; of equal scores the lower index first."""
    return {
        group.name: scores[group.name].argsort(stable=True)[: counts[group.name]].tolist()
        for group in groups
        if counts[group.name]
    }


def _format(value: float) -> str:
    """A number as people write it: 5,400,000, or 0.0123."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
