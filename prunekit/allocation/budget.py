"""Solve for whole units: scale a policy's shares, or rank everything together, until the model
costs what it may.

What stays is multilinear in the units removed (a matrix cut on both sides loses a product), so the
scale is found by bisection on the exact count; then units are rounded class by class, the dearest
first, each class making up for what the rounding of the ones before it left, and single steps are
moved while that comes nearer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from prunekit.allocation.costs.base import Cost
from prunekit.allocation.scope import Ranking, Slot
from prunekit.errors import ConfigError
from prunekit.graph import Group

Steps = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What `cost` must come down to (`limit`), and the slots that may be cut for it.

    `comparable`: scores of different groups can be compared as they are, instead of per unit of
    cost. `key` and `hint` are for messages: the option that sets the limit, and the ones that
    narrow what can go.
    """

    slots: Sequence[Slot]
    cost: Cost
    limit: float
    ranking: Ranking = "local"
    comparable: bool = False
    key: str = "ratio"
    hint: str = ""

    def __post_init__(self) -> None:
        dense, least = self.cost({}), self.cost(self.counts(self._most))
        cheapest = min(self._costs.values(), default=0.0)
        unit = self.cost.unit or self.cost.name
        if self.limit >= dense:
            raise ConfigError(
                f"{self.key}: expected less than the dense model's {_plain(dense)} {unit}, got {_plain(self.limit)}"
            )
        if self.limit < least - cheapest / 2:
            most = math.floor((1 - least / dense) * 10_000) / 10_000
            asked = f"{1 - self.limit / dense:.4g}" if self.key == "ratio" else _plain(self.limit)
            raise ConfigError(
                f"{self.key}: {asked} of {_plain(dense)} {unit} is out of reach: this policy and scope can remove at "
                f"most {most:.4g} of them, which leaves {_plain(least)}{self.hint}"
            )

    def counts(self, steps: Mapping[str, float]) -> dict[str, float]:
        """Units removed from each group at these steps of the slots; steps in between are
        interpolated.
        """
        found: dict[str, float] = {}
        for slot in self.slots:
            at = steps.get(slot.name, 0)
            low = min(math.floor(at), max(len(slot.removed) - 2, 0))
            high = min(low + 1, len(slot.removed) - 1)
            found |= slot.counts(
                slot.removed[low] + (slot.removed[high] - slot.removed[low]) * (at - low)
            )
        return found

    @cached_property
    def _costs(self) -> dict[str, float]:
        """Slot → what its last step is worth, the others whole; slots without a step are left out."""
        dense = self.cost({})
        found = {}
        for slot in self.slots:
            if len(slot.removed) > 1:
                units = slot.removed[-1] - slot.removed[-2]
                found[slot.name] = (
                    (dense - self.cost(slot.counts(slot.removed[-1]))) / slot.removed[-1] * units
                )
        return {name: cost for name, cost in found.items() if cost > 0}

    @cached_property
    def _most(self) -> Steps:
        """Slot → its last step."""
        return {slot.name: len(slot.removed) - 1 for slot in self.slots}

    def solve(
        self, scores: Mapping[str, Tensor] | None = None, progress: float = 1.0
    ) -> dict[str, int]:
        """Units to remove from each group; `scores` (group → [num_units]) are needed where groups
        compete.

        `progress` in (0, 1]: go only this share of the way.
        """
        dense = self.cost({})
        limit = dense - (dense - self.limit) * progress
        slots = [slot for slot in self.slots if slot.name in self._costs]
        if self.ranking == "model":
            assert scores is not None
            steps = self._ranked(slots, scores, limit, {})
        else:
            steps = self._scaled(limit)
        if self.ranking == "layer":
            assert scores is not None
            steps = self._ranked_in_layers(slots, scores, steps)
        steps = self._polished(steps, limit)
        return {name: round(count) for name, count in self.counts(steps).items()}

    def _at(self, scale: float, fixed: Mapping[str, int]) -> dict[str, float]:
        """Steps at a scale of the shares; slots in `fixed` keep theirs."""
        found: dict[str, float] = {}
        for slot in self.slots:
            units = min(scale * slot.share * slot.num_units, slot.removed[-1])
            low = max(i for i, gone in enumerate(slot.removed) if gone <= units)
            room = slot.removed[low + 1] - slot.removed[low] if low + 1 < len(slot.removed) else 1
            found[slot.name] = fixed.get(slot.name, low + (units - slot.removed[low]) / room)
        return found

    def _scaled(self, limit: float) -> Steps:
        """Whole steps that follow the shares, class by class of equal costs, the dearest first."""
        classes: dict[float, list[str]] = defaultdict(list)
        for slot in self.slots:
            classes[float(f"{self._costs.get(slot.name, 0.0):.6g}")].append(slot.name)
        fixed: Steps = {}
        for cost in sorted(classes, reverse=True):
            low, high = 0.0, 1.0
            while self.cost(self.counts(self._at(high, fixed))) > limit and high < 1e12:
                high *= 2
            for _ in range(60):
                middle = (low + high) / 2
                enough = self.cost(self.counts(self._at(middle, fixed))) <= limit
                low, high = (low, middle) if enough else (middle, high)
            steps = self._at(high, fixed)
            fixed |= self._rounded({name: steps[name] for name in classes[cost]})
        return fixed

    def _rounded(self, steps: dict[str, float]) -> Steps:
        """Whole numbers with the same total (to the nearest one), by largest remainder."""
        whole = {name: math.floor(step + 1e-9) for name, step in steps.items()}
        missing = math.floor(sum(steps.values()) + 0.5) - sum(whole.values())
        open_ = [name for name in steps if whole[name] < self._most[name]]
        for name in sorted(open_, key=lambda n: whole[n] - steps[n])[: max(missing, 0)]:
            whole[name] += 1
        return whole

    def _ranked(
        self, slots: Sequence[Slot], scores: Mapping[str, Tensor], limit: float, fixed: Steps
    ) -> Steps:
        """Steps of these slots, the least score for what it frees first; one that would overshoot
        ends its slot.
        """
        steps = {**fixed, **{slot.name: 0 for slot in slots}}
        queue = sorted(
            (density, i, at)
            for i, slot in enumerate(slots)
            for at, density in enumerate(self._densities(slot, scores), 1)
        )
        enough = bisect_left(
            range(len(queue) + 1),
            True,
            key=lambda k: self.cost(self.counts(_take(queue[:k], slots, steps))) <= limit,
        )
        steps = _take(queue[: max(enough - 1, 0)], slots, steps)
        left, closed = self.cost(self.counts(steps)), set[str]()
        cheapest = min(self._costs[slot.name] for slot in slots)
        for _, i, at in queue[
            max(enough - 1, 0) :
        ]:  # the one that may overshoot, and what still fits after it
            if left - limit <= cheapest / 2 or len(closed) == len(slots):
                break
            if (name := slots[i].name) not in closed:
                after = self.cost(self.counts({**steps, name: at}))
                if after >= limit - cheapest / 2:
                    steps[name], left = at, after
                else:
                    closed.add(name)
        return steps

    def _densities(self, slot: Slot, scores: Mapping[str, Tensor]) -> list[float]:
        """For each step the score that goes with it, over what it frees (or over its units where
        comparable).
        """
        found: list[float] = []
        ranked = {g.name: scores[g.name].sort().values for g in slot.groups}
        for before, after in zip(slot.removed, slot.removed[1:], strict=False):
            total = sum(
                float(ranked[n][f * before : f * after].sum()) for n, f in slot.factors.items()
            )
            worth = (
                1.0
                if self.comparable
                else self._costs[slot.name] / (slot.removed[-1] - slot.removed[-2])
            )
            found.append(max(total / (worth * (after - before)), found[-1] if found else -math.inf))
        return found

    def _ranked_in_layers(
        self, slots: Sequence[Slot], scores: Mapping[str, Tensor], steps: Steps
    ) -> Steps:
        """Each layer comes down to what the shares leave it, its slots ranked together."""
        layers: dict[int | None, list[Slot]] = defaultdict(list)
        for slot in slots:
            layers[slot.groups[0].layer].append(slot)
        for inside in layers.values():
            limit = self.cost(self.counts(steps))
            others = {
                name: at for name, at in steps.items() if name not in {slot.name for slot in inside}
            }
            steps = self._ranked(inside, scores, limit, others)
        return steps

    def _polished(self, steps: Steps, limit: float) -> Steps:
        """Move single steps while that comes nearer to the limit; where it gets stuck, a dear one
        for cheap ones.
        """
        steps, error = self._moved(steps, limit)
        for name in sorted(self._costs, key=lambda n: self._costs[n]):
            for move in (-1, 1):
                if (
                    error > min(self._costs.values()) / 2
                    and 0 <= steps[name] + move <= self._most[name]
                ):
                    trial, off = self._moved({**steps, name: steps[name] + move}, limit)
                    if off < error * (1 - 1e-9):
                        steps, error = trial, off
        return steps

    def _moved(self, steps: Steps, limit: float) -> tuple[Steps, float]:
        """Single steps moved to and fro, of the cheapest slots first, until none helps; how far it
        then is.
        """
        names = sorted(self._costs, key=lambda n: (self._costs[n], -steps[n]))
        error = abs(self.cost(self.counts(steps)) - limit)
        improved = True
        while improved:
            improved = False
            for name in names:
                for move in (1, -1) if error > self._costs[name] / 2 * (1 - 1e-9) else ():
                    trial = {**steps, name: steps[name] + move}
                    if 0 <= trial[name] <= self._most[name]:
                        off = abs(self.cost(self.counts(trial)) - limit)
                        if off < error * (1 - 1e-9):
                            steps, error, improved = trial, off, True
        return steps, error


def _take(queue: Sequence[tuple[float, int, int]], slots: Sequence[Slot], steps: Steps) -> Steps:
    """The steps after a queue's entries (density, slot, step), each slot's in order."""
    return {**steps, **{slots[i].name: at for _, i, at in queue}}


def lowest(
    groups: Sequence[Group], scores: Mapping[str, Tensor], counts: Mapping[str, int]
) -> dict[str, list[int]]:
    """The units with the lowest scores of each group, `counts` of them; ties go to the lower index."""
    return {
        g.name: scores[g.name].argsort(stable=True)[: counts[g.name]].tolist()
        for g in groups
        if counts[g.name]
    }


def _plain(value: float) -> str:
    """A number as people write it: 5,400,000, or 0.0123."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
