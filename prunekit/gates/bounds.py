"""What a choice of units must keep to while gates are learned: the budget, seen from below."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from prunekit.graph import Group

# Scores of units and a progress in (0, 1] → how many units of each group go, by group name.
Solve = Callable[[Mapping[str, Tensor], float], Mapping[str, int]]


class Keeper(Protocol):
    """Keeps tensors for a run that may be broken off; a name is FOLDER/NAME."""

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name."""

    def has_tensors(self, name: str) -> bool:
        """Whether tensors are kept under a name."""

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors that are kept under a name, on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a choice of units must keep to.

    Attributes:
        solve: how many units of each group go; the scores count where groups compete.
        competing: whether groups compete, so that the numbers depend on the scores.
        prices: group → what one of its units saves, in any unit that is the same for all groups.
        pinned: group → unit → −∞ or ∞: units that are gone, or must stay, whatever they score.
        share: units that go of each group [groups], as numbers with a fraction → the cost that is
            left [], as a share of the dense cost, differentiable; None where groups don't compete
            with all others, so that the numbers are settled for each.
        target: the share that the cost must come down to.
        name: tells this choice from others of the run, for the keeper.
        keeper: keeps what has been learned so far; None where a run keeps no state.
    """

    solve: Solve
    competing: bool
    prices: Mapping[str, float]
    pinned: Mapping[str, Mapping[int, float]]
    share: Callable[[Tensor], Tensor] | None = None
    target: float = 0.0
    name: str = "gates"
    keeper: Keeper | None = None


def halve(groups: Sequence[Group]) -> Bounds:
    """The bounds of a choice without a budget: half the units of every group go."""

    def solve(_: Mapping[str, Tensor], progress: float) -> dict[str, int]:
        return {group.name: round(group.num_units * progress / 2) for group in groups}

    prices = {group.name: float(group.parameters_per_unit) for group in groups}
    return Bounds(solve=solve, competing=False, prices=prices, pinned={})
