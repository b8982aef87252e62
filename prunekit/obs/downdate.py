"""A = (H + λI)⁻¹ and G = WᵀW while columns go, one after another or several at once.

W itself is not needed: ‖w_p‖² = G_pp. Removing p, with r and s its rows of A and of G:

    t = s − ½ (G_pp / A_pp) r,   w = −r / A_pp,   A ← A + rᵀw,   G ← G + tᵀw + wᵀt

(the elimination of p from A + εG, where ε² = 0). The vectors r, w and t are gathered to a block;
inside it only the row of the next column and the diagonals are brought up to date, and A and G are
at its end. Several columns S at once, with A_SS = L Lᵀ:

    U = L⁻¹ A_S:,   Z = L⁻¹ G_S:,   M = L⁻¹ G_SS L⁻ᵀ,   V = Z − ½ M U,
      A ← A − UᵀU,   G ← G − UᵀV − VᵀU
"""

import torch
from torch import Tensor

from prunekit.obs.inverse import Problem, cholesky
from prunekit.obs.matrices import hold

# Rows of a table: A_pp, a one, ½ G_pp, 1 / A_pp, the error ½ G_pp / A_pp, a zero, and the vectors
# of the steps. The order makes pairs of rows that one operation works on.
_A, _ONE, _G, _INVERSE, _ERROR, _ZERO, _STEPS = range(7)


class Downdate:
    """The columns of a problem of width one that are still there.

    Attributes:
        alive: [n], these columns: their units in the problem.
        matrices: A and G of these columns, without the present block; each is scaled to a mean
            diagonal of one at first.
        table: [rows, n], what the steps of a block work on: it stays where it is.
        unit: the error that an error of one stands for, a number in float64.
    """

    def __init__(self, problem: Problem, block: int) -> None:
        columns = problem.index[:, 0]
        self.alive = torch.arange(len(columns), device=columns.device)
        self.block = block
        self.matrices = hold(problem.inverse, problem.weight, columns)
        sizes = [
            half.diagonal().mean(dtype=torch.float64) for half in (self.matrices.a, self.matrices.g)
        ]
        a, g = (torch.where(size == 0, 1.0, size) for size in sizes)
        self.matrices.scale(1 / a, 1 / g)
        self.unit = g / a
        dtype, device = problem.inverse.dtype, problem.inverse.device
        self.table = torch.zeros(_STEPS + 3 * block, len(self.alive), dtype=dtype, device=device)
        self.table[_ONE] = 1
        # The least A_pp and ½ G_pp: rounding may take a column that the others explain below zero.
        self.floor = torch.tensor([[torch.finfo(dtype).tiny], [0]], dtype=dtype, device=device)
        self.places = _places(block, device)
        self._refresh()

    @property
    def errors(self) -> Tensor:
        """½ ‖w_p‖² / A_pp [n], in units of `unit`; infinite for columns the block has removed."""
        return self.table[_ERROR, : self.matrices.n]

    def _refresh(self) -> None:
        """Read the diagonals off A and G; make room for the vectors of a block."""
        table = self.table[:, : self.matrices.n]
        gone = table[_G].isinf()
        table[_A] = self.matrices.a.diagonal()
        torch.mul(self.matrices.g.diagonal(), 0.5, out=table[_G])
        table[_G].masked_fill_(gone, torch.inf)
        table[_A : _G + 1 : _G - _A].clamp_min_(self.floor)
        torch.div(table[_ONE : _G + 1], table[_A], out=table[_INVERSE : _ERROR + 1])
        table[_STEPS + self.block :].zero_()

    def remove(self, k: int, p: Tensor) -> None:
        """Remove one column `p` [1], step k of the block; nothing waits for the device."""
        table, first = self.table[:, : self.matrices.n], _STEPS + self.block
        w = first + 2 * k
        rows = table[_STEPS + k : w + 2 : w + 1 - _STEPS - k]  # r and s, which becomes t
        at = table[self.places[:, : 1 + 2 * k], p]
        self.matrices.read(p, rows)
        if k:
            rows.addmm_(at[:, 1:], table[first:w])
        table[w : w + 2].addcmul_(rows[0], at[:, :1], value=-1)  # zero becomes w, s becomes t
        diagonals = table[_A : _G + 1 : _G - _A]
        diagonals.addcmul_(table[w], rows).clamp_min_(self.floor)
        table[_G].index_fill_(0, p, torch.inf)
        torch.div(table[_ONE : _G + 1], table[_A], out=table[_INVERSE : _ERROR + 1])

    def settle(self, picked: Tensor) -> None:
        """End the block, whose steps have removed the columns `picked` [k]: A and G follow."""
        k, first = len(picked), _STEPS + self.block
        self._let_go(picked, self.table)
        table = self.table[:, : self.matrices.n]
        w, t = table[first : first + 2 * k : 2], table[first + 1 : first + 2 * k : 2]
        self.matrices.fold(table[_STEPS : _STEPS + k], w, t)
        self._refresh()

    def remove_group(self, picked: Tensor) -> None:
        """Remove the columns `picked` [k] at once, as a block of their own."""
        a, g = self.matrices.rows(picked)
        factor = cholesky(a[:, picked])
        u, z = (torch.linalg.solve_triangular(factor, rows, upper=False) for rows in (a, g))
        gram = torch.linalg.solve_triangular(factor, z[:, picked].T, upper=False)
        vectors = torch.cat([u, z.addmm_(gram, u, alpha=-0.5)])
        self.table[_G].index_fill_(0, picked, torch.inf)
        self._let_go(picked, vectors)
        u, v = vectors[:, : self.matrices.n].split(len(picked))
        self.matrices.fold(u, -u, v)
        self._refresh()

    def _let_go(self, picked: Tensor, vectors: Tensor) -> None:
        """Let the columns `picked` [k] go, in `vectors` [rows, n] and all else, where any go."""
        left = self.matrices.let_go(picked, vectors)
        if left is not None:
            self.alive = self.alive[left]
            self.table[_G] = 0  # none of those that are left has been removed


def _places(block: int, device: torch.device) -> Tensor:
    """What a step reads of a column p: the places [2, 1 + 2 · block] in its column of the table.

    First 1 / A_pp and the error. Then what the earlier vectors w and t, in turn, have to be
    multiplied by for the row p of A, and of G: by r_p and nothing, by t_p and w_p.
    """
    r = torch.arange(_STEPS, _STEPS + block)
    w = torch.arange(_STEPS + block, _STEPS + 3 * block, 2)
    for_a = torch.stack([r, torch.full_like(r, _ZERO)], 1).flatten()
    for_g = torch.stack([w + 1, w], 1).flatten()
    first = torch.tensor([[_INVERSE], [_ERROR]])
    return torch.cat([first, torch.stack([for_a, for_g])], 1).to(device)
