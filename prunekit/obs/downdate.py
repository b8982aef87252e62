"""A = (H + λI)⁻¹ and G = WᵀW while columns go: two symmetric matrices in the room of one.

Removing the columns S, with A_SS = L Lᵀ, U = L⁻¹ A_S:, Z = L⁻¹ G_S:, M = L⁻¹ G_SS L⁻ᵀ and
V = Z − ½ M U:

    A ← A − UᵀU,   G ← G − UᵀV − VᵀU

W itself is not needed: ‖w_p‖² = G_pp. Single columns one after another are the same with one row of
U and of V each (a Cholesky factorisation of A with weighted pivots). Rows are gathered to a block;
inside it only the row of the next pivot is evaluated, and A and G are updated at its end.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekit.obs.inverse import Problem, cholesky

_PANEL = 512  # the most columns of a panel; fewer than 4,096 columns make eight panels


class Downdate:
    """The columns of a problem of width one that are still there.

    Columns are divided into panels of P. Where i and j lie in panels I ≥ J, A_ij is `store[i, j]`
    and G_ij is `store[j, i + P]`, in a `store` [n, n + P]: only half of each symmetric matrix is
    kept and computed.

    Attributes:
        n: number of columns that are still there.
        factors: [2, block, n], the rows of U and V of the block's steps.
        steps: number of columns that the present block has removed.
        diagonals: [2, n], A_pp and ½ G_pp, after every step.
        unit: the error that an error of one stands for.
    """

    def __init__(self, problem: Problem, block: int) -> None:
        columns = problem.index[:, 0]
        self.n, self.panel = len(columns), _panel(len(columns))
        self.panels = torch.arange(self.n, device=columns.device) // self.panel
        self.sides = torch.tensor([0, self.panel], device=columns.device)
        self.store = problem.inverse.new_empty(self.n, self.n + self.panel)
        self.factors = problem.inverse.new_empty(2, block, self.n)
        self.steps = 0
        self._load(problem, columns)
        self._refresh()

    def _load(self, problem: Problem, columns: Tensor) -> None:
        """Fill the store with A and G, each scaled to a mean diagonal of one, and set `unit`."""
        inverse = problem.inverse
        whole = self.n == len(inverse) and bool(
            (columns == torch.arange(self.n, device=columns.device)).all()
        )
        weight = problem.weight.to(inverse.dtype)
        weight = weight if whole else weight[:, columns]
        for lo, hi in self._bounds():
            rows = inverse[lo:hi, :hi] if whole else inverse[columns[lo:hi, None], columns[:hi]]
            self.a[lo:hi, :hi] = rows
            self.g[lo:, lo:hi].addmm_(weight[:, lo:].T, weight[:, lo:hi], beta=0)
        size_a, size_g = (
            half.diagonal().mean(dtype=torch.float64).item() or 1.0 for half in (self.a, self.g)
        )
        for lo, hi in self._bounds():
            self.a[lo:, lo:hi].mul_(1 / size_a)
            self.g[lo:, lo:hi].mul_(1 / size_g)
        self.unit = size_g / size_a

    @property
    def a(self) -> Tensor:
        """A [n, n]; only panels I ≥ J are valid."""
        return self.store[: self.n, : self.n]

    @property
    def g(self) -> Tensor:
        """G [n, n]; only panels I ≥ J are valid."""
        return self.store[: self.n, self.panel : self.n + self.panel].T

    def _bounds(self) -> list[tuple[int, int]]:
        return [(lo, min(lo + self.panel, self.n)) for lo in range(0, self.n, self.panel)]

    def _refresh(self) -> None:
        """Read the diagonals off A and G."""
        self.diagonals = torch.stack([self.a.diagonal(), 0.5 * self.g.diagonal()])
        self._keep_positive()

    def _keep_positive(self) -> None:
        """Keep A_pp positive: rounding may take a column that the others explain below zero."""
        self.diagonals[0].clamp_min_(torch.finfo(self.store.dtype).tiny)

    def errors(self) -> Tensor:
        """½ ‖w_p‖² / A_pp [n], in units of `unit`; infinite for columns the block has removed."""
        return self.diagonals[1].clamp_min(0).div_(self.diagonals[0])

    def _row(self, p: Tensor) -> Tensor:
        """The row `p` [1] of A and of G before the block, [2, n]; nothing waits for the device."""
        n, panel = self.n, self.panel
        # From the whole store, because index_select would copy a part of the store first.
        across = self.store.index_select(0, p)[0]
        if n <= panel:
            return torch.stack([across[:n], across[panel : panel + n]])
        down = self.store.index_select(1, p + self.sides)[:n].T
        lower = self.panels[:n] <= self.panels.index_select(0, p)
        row = across.new_empty(2, n)
        torch.where(lower, across[:n], down[0], out=row[0])
        torch.where(lower, down[1], across[panel : panel + n], out=row[1])
        return row

    def _rows(self, index: Tensor) -> Tensor:
        """The rows `index` [m] of A and of G, [2, m, n]."""
        rows = self.store.new_empty(2, len(index), self.n)
        for lo, hi, here in self._by_panel(index):
            at = index[here]
            a, g = self.store[at, :hi], self.store[at, self.panel + lo : self.panel + self.n]
            rows[0, here] = torch.cat([a, self.store[hi : self.n, at].T], dim=1)
            rows[1, here] = torch.cat([self.store[:lo, at + self.panel].T, g], dim=1)
        return rows

    def _write(self, index: Tensor, rows: Tensor) -> None:
        """Write `rows` [2, m, n] to the rows and the columns `index` [m] of A and of G."""
        for lo, hi, here in self._by_panel(index):
            at, (a, g) = index[here], rows[:, here]
            self.store[at, :hi], self.store[at, self.panel + lo : self.panel + self.n] = (
                a[:, :hi],
                g[:, lo:],
            )
            self.store[lo : self.n, at], self.store[:hi, at + self.panel] = a[:, lo:].T, g[:, :hi].T

    def _by_panel(self, index: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """The bounds of each panel that `index` has columns of, and their places in `index`."""
        for lo, hi in self._bounds():
            here = ((index >= lo) & (index < hi)).nonzero()[:, 0]
            if len(here):
                yield lo, hi, here

    def remove(self, p: Tensor) -> None:
        """Remove one column `p` [1], the next step of the block; nothing waits for the device."""
        k = self.steps
        step, before = self.factors[:, k, : self.n], self.factors[:, :k, : self.n]
        rows = self._row(p)
        if k:
            at = self.factors.index_select(2, p)[:, :k, 0]
            rows.addmm_(at, before[0], alpha=-1)
            rows[1].addmv_(before[1].T, at[0], alpha=-1)
        pivot, half = self.diagonals.index_select(1, p)
        torch.div(rows, pivot.sqrt(), out=step)
        step[1].addcmul_(step[0], half / pivot, value=-1)
        self.diagonals.addcmul_(step[0], step, value=-1)
        self.diagonals[1].index_fill_(0, p, torch.inf)
        self._keep_positive()
        self.steps += 1

    def remove_group(self, index: Tensor) -> None:
        """Remove the columns `index` [k] at once, as a block of their own."""
        a, g = self._rows(index)
        factor = cholesky(a[:, index])
        u, z = (torch.linalg.solve_triangular(factor, rows, upper=False) for rows in (a, g))
        gram = torch.linalg.solve_triangular(factor, z[:, index].T, upper=False)
        self.factors = torch.stack([u, z.addmm_(gram, u, alpha=-0.5)])
        self.steps = len(index)

    def settle(self, holes: Tensor, movers: Tensor) -> None:
        """End the block: `movers` [m] fill the `holes` [m] (`vacancies`), A and G are updated."""
        factors = self.factors[:, : self.steps]
        n = self.n - self.steps
        factors[..., holes] = factors[..., movers]
        self._move(holes, movers, n)
        self._fold(factors[..., :n])
        self.steps = 0
        self._refresh()

    def _move(self, holes: Tensor, movers: Tensor, n: int) -> None:
        """Move the columns `movers` [m] to `holes` [m]; `n` columns are left."""
        rows = self._rows(movers)
        rows[..., holes] = rows[..., movers]
        self.n = n
        self._write(holes, rows[..., :n])

    def _fold(self, factors: Tensor) -> None:
        """A ← A − UᵀU and G ← G − UᵀV − VᵀU for the `factors` U and V [2, steps, n]."""
        u, v = factors
        for lo, hi in self._bounds():
            self.a[lo:, lo:hi].addmm_(u[:, lo:].T, u[:, lo:hi], alpha=-1)
            g = self.g[lo:, lo:hi]
            g.addmm_(u[:, lo:].T, v[:, lo:hi], alpha=-1).addmm_(v[:, lo:].T, u[:, lo:hi], alpha=-1)


def _panel(n: int) -> int:
    """Columns of a panel, for n columns in all."""
    return min(max(n // 8, 64), _PANEL, n)


def vacancies(picked: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The holes that removing `picked` [k] of n columns leaves, and the columns that fill them.

    Holes are the places [m] that come free among the first n − k; movers are the columns [m] that
    stay behind these places.
    """
    n -= len(picked)
    stays = torch.ones(len(picked), dtype=torch.bool, device=picked.device)
    stays[picked[picked >= n] - n] = False
    return picked[picked < n], stays.nonzero()[:, 0] + n
