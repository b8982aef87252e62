"""Optimal Brain Surgeon on columns (SlimGPT, sections 3 and 4): inverse, removals, their errors.

W [d, n] is a consumer's weight, H [n, n] the mean of x xᵀ over its inputs, A = (H + λI)⁻¹. Removing
the columns S:

    error   E(S) = tr(W_S (A_SS)⁻¹ W_Sᵀ) = ‖L⁻¹ W_Sᵀ‖²,  A_SS = L Lᵀ
    update  W ← W − W_S (A_SS)⁻¹ A_S:,   A ← A − A_:S (A_SS)⁻¹ A_S:

so that after any sequence of removals the kept columns are the least-squares optimum
W H_:K (H_KK)⁻¹.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from prunekit.errors import DataError

HeadScore = Literal["exact", "grouped_cholesky", "diagonal"]

# The variance inflation factors A_jj (H + λI)_jj tell how much the other inputs explain of input
# j, whatever its scale, and bound how much removals can cancel in a column. Measured at the limit,
# with half of the columns removed: A_ij in float32 is right to 6e-3 of √(A_ii A_jj), and the error
# of the layer is 6e-6 above the least; both grow with the limit, the latter as its square.
_INFLATION = 1e4
_DEAD = 1e-20  # an input of less than this share of the largest mean square can't be told from zero


@dataclass(frozen=True, kw_only=True)
class Inverse:
    """A = (H + λI)⁻¹ [n, n], in float32 or float64.

    `dead` [n]: the inputs that can't be told from zero; A has zeros beside the diagonal there.
    `damping`: λ / mean(diag H), as much as it took.
    """

    matrix: Tensor
    dead: Tensor
    damping: float


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A site that a group's units feed: W [d, n] of its consumers, and A = (H + λI)⁻¹ [n, n].

    `index` [units, width]: the columns of each unit. W may have any float dtype; results have that
    of A. Where a group has several sites, the error of a unit is the sum over their problems.
    """

    weight: Tensor
    inverse: Tensor
    index: Tensor


def invert(hessian: Tensor, damping: float = 0.0) -> Inverse:
    """Invert a Hessian [n, n] with as little damping as the factorisation needs.

    The result is float32 where that is accurate, float64 elsewhere. λ starts at
    `damping`·mean(diag H), and rises tenfold until the Cholesky factorisation succeeds with pivots
    that the dtype of the Hessian can tell from zero. Dead inputs are set apart first; H never
    becomes the identity. All is computed on D^-½ (H + λI) D^-½ with a unit diagonal, so that the
    scale of H, or of one input, does not matter.

    Raises:
        DataError: the Hessian holds NaN or infinity, or no second moments at all.
    """
    return _use_factor(hessian, damping, _invert_factor)


def solve(hessian: Tensor, right: Tensor, damping: float = 0.0) -> Tensor:
    """R (H + λI)⁻¹ [k, n] for `right` R [k, n], in its dtype; λ as in `invert`.

    There is no inverse on the way: it takes a third of the work of one.

    Raises:
        DataError: as in `invert`.
    """
    used = _use_factor(hessian, damping, partial(_solve_factor, right))
    return used.matrix.to(right.dtype)


# use(factor, root, sound): what is made of the factor L [n, n] of D^-½ (H + λI) D^-½, given the
# roots of D⁻¹ [n]; and whether it is accurate, as a number on the device.
_Use = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _use_factor(hessian: Tensor, damping: float, use: _Use) -> Inverse:
    """Factorise H + λI with the least λ that allows it; what is made of the factor is `matrix`."""
    diagonal = hessian.diagonal().double()
    dead = diagonal <= _DEAD * diagonal.max().clamp_min(0)
    count = len(dead) - dead.count_nonzero()
    mean = torch.where(count > 0, diagonal.masked_fill(dead, 0).sum() / count, 1.0)
    double = hessian.dtype == torch.float64
    floor = 1e-12 if double else torch.finfo(torch.float32).eps
    attempt = partial(_try_factor, hessian, dead=dead, mean=mean, use=use)
    share = damping
    matrix = None
    if not double:
        matrix = attempt(diagonal + share * mean, floor=1 / _INFLATION, dtype=torch.float32)
    if matrix is None:
        matrix = attempt(diagonal + share * mean, floor=floor, dtype=torch.float64)
    while matrix is None:
        if not share < 1:
            raise DataError("the Hessian can't be inverted: expected finite second moments")
        share = max(share * 10, floor)
        matrix = attempt(diagonal + share * mean, floor=floor, dtype=torch.float64)
    return Inverse(matrix=matrix, dead=dead, damping=share)


def _try_factor(
    hessian: Tensor,
    diagonal: Tensor,
    *,
    dead: Tensor,
    mean: Tensor,
    floor: float,
    dtype: torch.dtype,
    use: _Use,
) -> Tensor | None:
    """Use the factor of `hessian` [n, n] with another `diagonal` [n]; None if it is inaccurate.

    It is where a squared pivot is not above `floor`, or where `use` finds so. A GPU is waited for
    once.
    """
    root = diagonal.masked_fill(dead, torch.inf).rsqrt().to(dtype)
    scaled = hessian.to(dtype, copy=True).mul_(root[:, None]).mul_(root)
    scaled.diagonal().fill_(1)
    columns = scaled.T  # symmetric, in LAPACK's order: factor and inverse take its place
    info = torch.empty((), dtype=torch.int32, device=scaled.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    sound = (info == 0) & (scaled.diagonal().square().min() > floor)
    if scaled.device.type == "cpu" and not sound:
        return None  # to go on would take a CPU longer than to look
    root.masked_fill_(dead, mean.rsqrt())
    used, sound = use(columns, root, sound)
    return used if sound else None


def _invert_factor(factor: Tensor, root: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
    """A = (H + λI)⁻¹; in float32 it is inaccurate where an inflation factor is above the limit."""
    torch.cholesky_inverse(factor, out=factor)
    scaled = factor.T
    if scaled.dtype == torch.float32:
        sound = sound & (scaled.diagonal().max() <= _INFLATION)
    scaled.mul_(root[:, None]).mul_(root)
    return scaled, sound & torch.isfinite(scaled.diagonal()).all()


def _solve_factor(
    right: Tensor, factor: Tensor, root: Tensor, sound: Tensor
) -> tuple[Tensor, Tensor]:
    """R (H + λI)⁻¹."""
    solution = torch.cholesky_solve((right.to(root) * root).T, factor).T * root
    return solution, sound & torch.isfinite(solution).all()


def cholesky(blocks: Tensor, failed: list[Tensor] | None = None) -> Tensor:
    """L of positive definite `blocks` [..., k, k].

    Where rounding has made a block indefinite, its diagonal is raised as little as it takes. With a
    list `failed` nothing waits for the device: the number of such blocks is appended to it, and
    what is returned for them is no factor.
    """
    factor, info = torch.linalg.cholesky_ex(blocks)
    if failed is not None:
        failed.append(info.count_nonzero())
        return factor
    share = torch.finfo(blocks.dtype).eps
    while info.any() and share < 1:
        share *= 10
        factor, info = torch.linalg.cholesky_ex(
            blocks + share * torch.diag_embed(blocks.diagonal(dim1=-2, dim2=-1))
        )
    return factor


def remove_columns(weight: Tensor, inverse: Tensor, removed: Tensor) -> Tensor:
    """W [d, n] with the columns `removed` [k] zero and the others at their least-squares optimum.

    The result has the dtype of A; `weight` does not change.
    """
    weight = weight.to(inverse.dtype)
    rows = inverse.index_select(0, removed)
    factor = cholesky(rows.index_select(1, removed))
    gone = torch.cholesky_solve(weight[:, removed].T, factor)
    del factor
    updated = torch.addmm(weight, gone.T, rows, alpha=-1)
    updated[:, removed] = 0
    return updated


def removal_error(problem: Problem, units: Sequence[int]) -> Tensor:
    """E(S) in float64, where S are the columns of all `units`, removed together."""
    return added_errors(problem, units).sum()


def added_errors(problem: Problem, units: Sequence[int]) -> Tensor:
    """What each unit adds to the error when all go in this order, float64 [units].

    E(S_k) − E(S_{k−1}), S_k the columns of the first k units. With the columns in this order and
    A_SS = L Lᵀ these are the squared norms of the rows of L⁻¹ W_Sᵀ, summed over a unit's columns:
    a leading block of L belongs to the first units alone.
    """
    index = torch.as_tensor(units, dtype=torch.long, device=problem.index.device)
    columns = problem.index[index].flatten()
    factor = cholesky(problem.inverse[columns[:, None], columns])
    half = torch.linalg.solve_triangular(
        factor, problem.weight[:, columns].to(factor).T, upper=False
    )
    return half.square().sum(1, dtype=torch.float64).view(-1, problem.index.shape[1]).sum(1)


def unit_errors(
    problems: Sequence[Problem], score: HeadScore, failed: list[Tensor] | None = None
) -> Tensor:
    """Errors [units], float64, of removing each unit alone, summed over `problems`.

    exact: E(S). grouped_cholesky (SlimGPT, algorithm 1): Σ_j ‖w_j‖² / L_jj² with A_SS = L Lᵀ and w
    not updated. diagonal (its "−GCD" ablation): Σ_j ‖w_j‖² / A_jj. `failed`: see `cholesky`.
    """
    return torch.stack([_errors(problem, score, failed) for problem in problems]).sum(0)


def _errors(problem: Problem, score: HeadScore, failed: list[Tensor] | None) -> Tensor:
    index = problem.index
    blocks = problem.inverse[index[:, :, None], index[:, None, :]]
    columns = problem.weight.T[index].to(blocks.dtype)  # [units, width, d]
    if score == "exact":
        half = torch.linalg.solve_triangular(cholesky(blocks, failed), columns, upper=False)
        return half.square().sum((1, 2), dtype=torch.float64)
    if score == "grouped_cholesky":
        pivots = cholesky(blocks, failed).diagonal(dim1=1, dim2=2).square()
    else:
        pivots = blocks.diagonal(dim1=1, dim2=2)
    return (columns.square().sum(-1) / pivots).sum(-1, dtype=torch.float64)
