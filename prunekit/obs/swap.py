"""Exchange a removed unit with a kept one while the exact error falls.

With S removed and K kept: C = (A_SS)⁻¹, B = C A_SK, A' = A_KK − A_KS B, Y = W_S C, W' = W_K − W_S
B. Taking p back and removing q instead changes the error by

    Δ_pq = − tr(C_pp⁻¹ YᵀY_pp) + tr(V⁻¹ N),   R = C_pp⁻¹ B_pq,   V = A'_qq + B_pqᵀ R,
    N = (w'_q + y_p R)ᵀ (w'_q + y_p R)

where p and q are units of width h, and all of it is in two matrices: T = [[−C, B], [Bᵀ, A']], which
is A swept on S, and the Gram matrix of [Y, W']. An exchange sweeps both back on p and on q: two
updates of rank h each.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from prunekit.obs.inverse import Problem, cholesky, removal_error

_CHUNK = 1 << 22  # elements of a temporary tensor at most
_BLOCK = 256  # columns that are swept at once


class _Swept:
    """T and the Gram matrix of [Y, W'], both [units · h, units · h], unit after unit.

    Nothing is removed at first: T is A, and the Gram matrix is WᵀW.
    """

    def __init__(self, problem: Problem) -> None:
        columns = problem.index.flatten()
        weight = problem.weight[:, columns].to(problem.inverse.dtype)
        self.units, self.width = problem.index.shape
        self.t, self.gram = problem.inverse[columns[:, None], columns], weight.T @ weight

    def columns(self, units: Tensor) -> Tensor:
        """The positions [k · h] of `units` [k]."""
        return (
            units[:, None] * self.width + torch.arange(self.width, device=units.device)
        ).flatten()

    def sweep(self, units: Tensor, sign: int) -> None:
        """Remove `units` [k] that are kept (sign 1), or take back removed ones (sign −1)."""
        at = self.columns(units)
        rows = self.t[at]
        inverse = sign * torch.cholesky_inverse(cholesky(sign * rows[:, at]))
        gain = inverse @ rows
        self.t.addmm_(rows.T, gain, alpha=-1)
        self.t[at], self.t[:, at] = sign * gain, sign * gain.T
        self.t[at[:, None], at] = -inverse
        gain[:, at] = torch.eye(len(at), dtype=gain.dtype, device=gain.device) - sign * inverse
        side = self.gram[at].sub_(0.5 * self.gram[at[:, None], at] @ gain)
        self.gram.addmm_(side.T, gain, alpha=-1).addmm_(gain.T, side, alpha=-1)

    def changes(self, p: Tensor, q: Tensor) -> Tensor:
        """Δ [len(p), len(q)] in float64: taking back the removed units p, removing the kept q."""
        view = (self.units, self.width, self.units, self.width)
        # Both as [units, units, h, h].
        t, gram = (matrix.view(view).transpose(1, 2) for matrix in (self.t, self.gram))
        freed, lost = (t[p, p].neg(), gram[p, p]), (t[q, q], gram[q, q])
        pairs = t[p[:, None], q], gram[p[:, None], q]
        return (_narrow if self.width == 1 else _wide)(freed, lost, pairs)


def _narrow(
    freed: tuple[Tensor, Tensor], lost: tuple[Tensor, Tensor], pairs: tuple[Tensor, Tensor]
) -> Tensor:
    """Δ for units of one column."""
    c, y, a, w = (x[:, 0, 0] for x in (*freed, *lost))
    b, between = (x[..., 0, 0] for x in pairs)
    r = b / c[:, None]
    norms = torch.addcmul(w, r, between, value=2).addcmul_(r * r, y[:, None]).clamp_min_(0)
    return norms.div_(torch.addcmul(a, b, r)).double().sub_((y / c).double()[:, None])


def _wide(
    freed: tuple[Tensor, Tensor], lost: tuple[Tensor, Tensor], pairs: tuple[Tensor, Tensor]
) -> Tensor:
    """Δ for units of h columns."""
    (c, y), (a, w), (b, between) = freed, lost, pairs
    factor = cholesky(c)
    r = torch.cholesky_solve(b, factor[:, None])
    cross = r.mT @ between
    norms = w + cross + cross.mT + r.mT @ y[:, None] @ r
    after = torch.cholesky_solve(norms, cholesky(a + b.mT @ r))
    now = torch.cholesky_solve(y, factor)
    trace = [x.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64) for x in (after, now)]
    return trace[0] - trace[1][:, None]


def swap(problems: Sequence[Problem], removed: Iterable[int]) -> list[int]:
    """Exchange the best pair of a removed and a kept unit while Σ E(S) falls; the units removed.

    There are no more swaps than units. Each must lower the error by more than the share √eps of A's
    dtype, below which rounding could turn it round. A problem takes two matrices [n, n] beside A.
    """
    order, device = list(removed), problems[0].index.device
    kept = sorted(set(range(len(problems[0].index))) - set(order))
    if not order or not kept:
        return order
    error = sum(removal_error(problem, order).item() for problem in problems)
    swept = [_Swept(problem) for problem in problems]
    for part in torch.tensor(order, device=device).split(max(1, _BLOCK // swept[0].width)):
        for state in swept:
            state.sweep(part, 1)
    tolerance = max(torch.finfo(state.t.dtype).eps ** 0.5 for state in swept)
    for _ in range(swept[0].units):
        least, i, j = _best(
            swept, torch.tensor(order, device=device), torch.tensor(kept, device=device)
        )
        if not least < -tolerance * error:
            break
        error += least
        for state in swept:
            state.sweep(torch.tensor([order[i]], device=device), -1)
            state.sweep(torch.tensor([kept[j]], device=device), 1)
        order[i], kept[j] = kept[j], order[i]
    return order


def _best(swept: Sequence[_Swept], p: Tensor, q: Tensor) -> tuple[float, int, int]:
    """The least Σ Δ over all pairs, and its places in `p` and `q`."""
    least = []
    rows = max(1, _CHUNK // (len(q) * swept[0].width ** 2))
    for lo in range(0, len(p), rows):
        changes = sum(
            (s.changes(p[lo : lo + rows], q) for s in swept[1:]),
            swept[0].changes(p[lo : lo + rows], q),
        )
        value, place = changes.nan_to_num_(torch.inf).flatten().min(0)
        least.append((float(value), lo + int(place) // len(q), int(place) % len(q)))
    return min(least)
