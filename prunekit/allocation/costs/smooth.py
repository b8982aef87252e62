"""A cost as a function of tensors, so that it has a gradient, and no device is waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekit.allocation.costs.base import Cost


class SmoothCost:
    """What a cost leaves, as a share of the dense cost, given how many units go.

    Args:
        cost: the cost.
        names: the groups, in the order of the numbers.
        device: where they are.
    """

    def __init__(self, cost: Cost, names: Sequence[str], device: torch.device) -> None:
        place = {name: i for i, name in enumerate(names)}
        self.dense = cost({})
        factors: list[float] = []
        rows: list[list[int]] = []  # the factors of each term
        cuts: list[tuple[int, int, int]] = []  # (factor, group, width)
        for term in cost.terms:
            cuts += [(len(factors) + i, place[n], w) for n, i, w in term.cuts if n in place]
            rows.append(list(range(len(factors), len(factors) + len(term.sizes))))
            factors += term.sizes
        self.coefficients = _vector([term.coefficient for term in cost.terms], device)
        self.factors = _vector(factors, device)
        longest = max(map(len, rows), default=0)
        padded = [row + [len(factors)] * (longest - len(row)) for row in rows]
        self.rows = torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), longest)
        parts = torch.tensor(cuts, dtype=torch.long).view(-1, 3).to(device)
        self.cut, self.group, self.width = parts.unbind(1)
        # Tables of groups that are not among the names add what they cost whole.
        self.rest = sum(table[-1] for name, table in cost.tables.items() if name not in place)
        tables = {place[name]: table for name, table in cost.tables.items() if name in place}
        self.tabled = [(i, _vector(table, device)) for i, table in tables.items()]

    def __call__(self, removed: Tensor) -> Tensor:
        """The share [] that is left once so many units [groups] go, in float64."""
        gone = removed.double()
        kept = self.factors.index_add(0, self.cut, -self.width * gone[self.group])
        kept = torch.cat([kept, kept.new_ones(1)])  # what shorter rows are filled up with
        total = (self.coefficients * kept[self.rows].prod(1)).sum() + self.rest
        for i, table in self.tabled:
            total = total + _interpolate(table, len(table) - 1 - gone[i])
        return total / self.dense


def _vector(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def _interpolate(table: Tensor, kept: Tensor) -> Tensor:
    """A table at a number of units kept, linear in between."""
    low = kept.detach().floor().clamp(0, len(table) - 2).long()
    return table[low] + (table[low + 1] - table[low]) * (kept - low)
