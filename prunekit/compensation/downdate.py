"""A = (H + λI)⁻¹ and G = WᵀW while columns go: two symmetric matrices in the room of one, folded a block at a time.

Removing the columns S, with A_SS = L Lᵀ, U = L⁻¹ A_S:, Z = L⁻¹ G_S:, M = L⁻¹ G_SS L⁻ᵀ and V = Z − ½ M U:

    A ← A − UᵀU,   G ← G − UᵀV − VᵀU

W itself is not needed: ‖w_p‖² = G_pp. Single columns in a row are the same with one row of U and V each (a Cholesky
factorisation of A with weighted pivots); inside a block only the row of the pivot is evaluated.
"""

import torch
from torch import Tensor

from prunekit.compensation.solver import Problem, cholesky

_PANEL = 512  # columns at most, an eighth of them where they are fewer than 4,096


class Downdate:
    """The columns of a problem of width one that are still there.

    Where i and j lie in panels I ≥ J of P columns, A_ij is `store[i, j]` and G_ij is `store[j, i + P]`, in a `store`
    [n, n + P]: only half of each symmetric matrix is kept and computed.
    """

    def __init__(self, problem: Problem, block: int) -> None:
        columns = problem.index[:, 0]
        self.n, self.panel = len(columns), _panel(len(columns))
        self.panels = torch.arange(self.n, device=columns.device) // self.panel
        self.sides = torch.tensor([0, self.panel], device=columns.device)
        self.store = problem.inverse.new_empty(self.n, self.n + self.panel)
        self.factors = problem.inverse.new_empty(2, block, self.n)  # U and V of the block's steps
        self.steps = 0
        self._load(problem, columns)
        self._refresh()

    def _load(self, problem: Problem, columns: Tensor) -> None:
        """Fill the store; A and G are brought to a mean diagonal of one, `unit` is what an error of one stands for."""
        inverse = problem.inverse
        whole = self.n == len(inverse) and bool((columns == torch.arange(self.n, device=columns.device)).all())
        weight = problem.weight.to(inverse.dtype)
        weight = weight if whole else weight[:, columns]
        for lo, hi in self._bounds():
            rows = inverse[lo:hi, :hi] if whole else inverse[columns[lo:hi, None], columns[:hi]]
            self.a[lo:hi, :hi] = rows
            self.g[lo:, lo:hi].addmm_(weight[:, lo:].T, weight[:, lo:hi], beta=0)
        size_a, size_g = (half.diagonal().mean(dtype=torch.float64).item() or 1.0 for half in (self.a, self.g))
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
        self.pivots = self.a.diagonal().clamp_min(torch.finfo(self.store.dtype).tiny)
        self.norms = self.g.diagonal().clone()

    def errors(self) -> Tensor:
        """‖w_p‖² / A_pp [n], in units of `unit`; infinite for the block's columns."""
        return self.norms.clamp_min(0).div_(self.pivots)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows `index` [m] of A and G, [m, n] each, as they were before the block."""
        n, panel = self.n, self.panel
        across = self.store.index_select(0, index)[:, : n + panel]  # of the whole store: of a part it would copy that
        if n <= panel:
            return across[:, :n], across[:, panel:]
        down = self.store.index_select(1, (index + self.sides[:, None]).flatten())[:n].T
        lower = self.panels[:n] <= self.panels.index_select(0, index)[:, None]
        m = len(index)
        return torch.where(lower, across[:, :n], down[:m]), torch.where(lower, down[m:], across[:, panel:])

    def remove(self, p: Tensor) -> None:
        """Remove one column `p` [1], as the next step of the block."""
        k = self.steps
        u, v = self.factors[:, k, : self.n]
        a, g = (rows[0] for rows in self.rows(p))
        if k:
            before = self.factors[:, :k, : self.n]
            at = self.factors.index_select(2, p)[:, :k, 0]
            a = torch.addmv(a, before[0].T, at[0], alpha=-1)
            g = torch.addmv(g, before[0].T, at[1], alpha=-1).addmv_(before[1].T, at[0], alpha=-1)
        pivot = self.pivots.index_select(0, p)
        root = pivot.sqrt()
        torch.div(a, root, out=u)
        torch.div(g, root, out=v).addcmul_(u, self.norms.index_select(0, p) / pivot, value=-0.5)
        self.pivots.addcmul_(u, u, value=-1).clamp_min_(torch.finfo(u.dtype).tiny)
        self.norms.addcmul_(u, v, value=-2).index_fill_(0, p, torch.inf)
        self.steps += 1

    def remove_group(self, index: Tensor) -> None:
        """Remove the columns `index` [k] at once, as a block."""
        a, g = self.rows(index)
        factor = cholesky(a[:, index])
        u, z = (torch.linalg.solve_triangular(factor, rows, upper=False) for rows in (a, g))
        gram = torch.linalg.solve_triangular(factor, z[:, index].T, upper=False)
        self.factors = torch.stack([u, z.addmm_(gram, u, alpha=-0.5)])
        self.steps = len(index)

    def settle(self, holes: Tensor, movers: Tensor) -> None:
        """End the block: `movers` [m] take the places `holes` [m] of its columns (`vacancies`); A and G are updated."""
        factors = self.factors[:, : self.steps]
        n = self.n - self.steps
        factors[..., holes] = factors[..., movers]
        self._move(holes, movers, n)
        self._fold(factors[..., :n])
        self.steps = 0
        self._refresh()

    def _move(self, holes: Tensor, movers: Tensor, n: int) -> None:
        """Move the columns `movers` [m] to `holes` [m] and leave it at `n` columns."""
        a, g = self.rows(movers)
        for rows in (a, g):
            rows[:, holes] = rows[:, movers]
        self.n, a, g = n, a[:, :n], g[:, :n]
        lower = self.panels[:n] <= self.panels[holes][:, None]
        upper = self.panels[:n] >= self.panels[holes][:, None]
        for part, values, valid in ((self.a, a, lower), (self.g.T, g, upper)):
            part[holes] = torch.where(valid, values, part[holes])
        for part, values, valid in ((self.a, a, upper), (self.g.T, g, lower)):
            part[:, holes] = torch.where(valid, values, part[:, holes].T).T

    def _fold(self, factors: Tensor) -> None:
        u, v = factors
        for lo, hi in self._bounds():
            self.a[lo:, lo:hi].addmm_(u[:, lo:].T, u[:, lo:hi], alpha=-1)
            g = self.g[lo:, lo:hi]
            g.addmm_(u[:, lo:].T, v[:, lo:hi], alpha=-1).addmm_(v[:, lo:].T, u[:, lo:hi], alpha=-1)


def _panel(n: int) -> int:
    return min(max(n // 8, 64), _PANEL, n)


def vacancies(picked: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of n columns the `picked` [k] go: which of the first n − k places come free, and which others move there."""
    n -= len(picked)
    stays = torch.ones(len(picked), dtype=torch.bool, device=picked.device)
    stays[picked[picked >= n] - n] = False
    return picked[picked < n], stays.nonzero()[:, 0] + n
