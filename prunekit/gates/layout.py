"""The gates of all groups in one vector, and the ranks of units inside of their groups."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

from prunekit.graph import Group


class Layout:
    """Where the units of each group lie in one flat vector [U] of all gates.

    Args:
        groups: in any order; it is kept.
        device: where vectors are.
        foldable: the names of groups whose consumers can take a factor for each unit.

    Attributes:
        names: the names of the groups.
        sizes: how many units each has.
        group_of: int64 [U], the number of each unit's group.
        foldable: bool [U], whether a factor of the unit can be folded into weights.
        leaving: bool [G], whether a group can lose all of its units: its sublayer goes then.
    """

    def __init__(
        self, groups: Sequence[Group], device: torch.device, foldable: Container[str] = ()
    ) -> None:
        self.names = [group.name for group in groups]
        self.sizes = [group.num_units for group in groups]
        self.device = device
        sizes = torch.tensor(self.sizes)
        self.group_of = torch.arange(len(groups)).repeat_interleave(sizes).to(device)
        folds = torch.tensor([name in foldable for name in self.names])
        self.foldable = folds.repeat_interleave(sizes).to(device)
        self.leaving = torch.tensor([group.must_stay is None for group in groups], device=device)
        starts = sizes.cumsum(0) - sizes
        inside = torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)
        self._padded = (self.group_of, inside.to(device))

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector [U] as group name → [num_units], views of it."""
        return dict(zip(self.names, flat.split(self.sizes), strict=True))

    def join(self, values: Mapping[str, Tensor | float]) -> Tensor:
        """Group name → values [num_units], or one value for all units, as a float32 vector [U]."""
        parts = [
            torch.as_tensor(values[name], dtype=torch.float32).expand(size)
            for name, size in zip(self.names, self.sizes, strict=True)
        ]
        return torch.cat(parts).to(self.device)

    def mean(self, flat: Tensor) -> Tensor:
        """The mean of each unit's group [U]."""
        sums = flat.new_zeros(len(self.sizes)).index_add(0, self.group_of, flat)
        counts = torch.bincount(self.group_of, minlength=len(self.sizes))
        return (sums / counts)[self.group_of]

    def ranks(self, flat: Tensor) -> Tensor:
        """The rank of each unit in its group, 0 for the lowest; of equal ones the lower index.

        int64 [U]; nothing waits for the device.
        """
        padded = flat.new_full((len(self.sizes), max(self.sizes)), math.inf)
        padded[self._padded] = flat
        order = padded.argsort(dim=1, stable=True)
        ranks = torch.empty_like(order)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return ranks.scatter(1, order, places)[self._padded]

    def keep_highest(self, flat: Tensor, gone: Tensor) -> Tensor:
        """1 for units that stay, 0 for the lowest of each group [U].

        `gone` [U] is how many go of the group of each unit.
        """
        return (self.ranks(flat) >= gone).to(flat.dtype)
