"""Optimal Brain Surgeon on columns (SlimGPT, sections 3 and 4): pure tensor maths, float64.

W [d, n] is a consumer's weight, H [n, n] the mean of x xᵀ over its inputs, A = (H + λI)⁻¹. Removing the columns S:

    error   E(S) = tr(W_S (A_SS)⁻¹ W_Sᵀ) = ‖L⁻¹ W_Sᵀ‖²,  A_SS = L Lᵀ
    update  W ← W − W_S (A_SS)⁻¹ A_S:,   A ← A − A_:S (A_SS)⁻¹ A_S:

so that after any sequence of removals the kept columns are the least-squares optimum W H_:K (H_KK)⁻¹.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

HeadScore = Literal["exact", "grouped_cholesky", "diagonal"]
_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Inverse:
    """A = (H + λI)⁻¹ [n, n], float64; dead inputs (H_jj = 0) have a unit diagonal. `damping` is λ / mean(diag H)."""

    matrix: Tensor
    dead: Tensor
    damping: float


def invert(hessian: Tensor, damping: float = 0.0) -> Inverse:
    """Invert a Hessian [n, n], damped no more than it takes.

    Starts at `damping`·mean(diag H) and raises λ tenfold until the Cholesky factorisation succeeds with pivots that
    float64 can tell from zero. Dead inputs are set apart first; H never becomes the identity.
    """
    h = hessian.double()
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean().item() if (~dead).any() else 1.0
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    share = damping
    while True:
        damped = h + eye * (share * mean)
        damped[dead] = 0
        damped[:, dead] = 0
        damped[dead, dead] = mean
        factor, info = torch.linalg.cholesky_ex(damped)
        pivots = factor.diagonal().square()
        if not info and pivots.min() > 1e-12 * pivots.max():
            return Inverse(matrix=torch.cholesky_inverse(factor), dead=dead, damping=share)
        share = max(share * 10, 1e-10)


def remove_columns(weight: Tensor, inverse: Tensor, removed: Tensor) -> Tensor:
    """W [d, n] with the columns `removed` [k] zeroed and the others at their least-squares optimum."""
    block = inverse[removed][:, removed]
    factor = torch.linalg.cholesky(block)
    updated = weight - torch.cholesky_solve(weight[:, removed].T, factor).T @ inverse[removed]
    updated[:, removed] = 0
    return updated


def choose_columns(weight: Tensor, inverse: Tensor, count: int) -> list[int]:
    """Greedy order in which single columns go: argmin ‖w_p‖² / A_pp, update W and A, repeat; exact.

    This is a Cholesky factorisation of A with weighted pivots. With u = A_:p/√A_pp and z = G_:p/√A_pp, where G = WᵀW,
    a removal does A ← A − u uᵀ and G ← G − u zᵀ − z uᵀ + (zᵀe_p/√A_pp) u uᵀ. W itself is not needed, and n × n matrices
    are touched once a block of steps: inside it only the row of the pivot is evaluated.
    """
    a, g = inverse.clone(), weight.T @ weight
    n = len(a)
    alive = torch.arange(n, device=a.device)
    order: list[int] = []
    while len(order) < count:
        steps = min(_BLOCK, count - len(order))
        picked = _choose_block(a, g, steps)
        order += alive[picked].tolist()
        keep = torch.ones(len(alive), dtype=torch.bool, device=a.device)
        keep[picked] = False
        alive, a, g = alive[keep], a[keep][:, keep], g[keep][:, keep]
    return order


def _choose_block(a: Tensor, g: Tensor, steps: int) -> Tensor:
    """Remove `steps` columns; returns them and brings `a` and `g` up to date in place."""
    n = len(a)
    u, z = a.new_zeros(steps, n), a.new_zeros(steps, n)
    curvature = a.new_zeros(steps)
    diagonal, norms = a.diagonal().clone(), g.diagonal().clone()
    picked: list[Tensor] = []
    for k in range(steps):
        score = norms.clamp_min(0) / diagonal
        if picked:
            score[torch.stack(picked)] = torch.inf
        p = score.argmin()
        root = diagonal[p].sqrt()
        u_k = (a[p] - u[:k, p] @ u[:k]) / root
        up, zp = u[:k, p], z[:k, p]
        row = g[p] - up @ z[:k] - zp @ u[:k] + (curvature[:k] * up) @ u[:k]
        z_k = row / root
        c = norms[p] / diagonal[p]
        u[k], z[k], curvature[k] = u_k, z_k, c
        diagonal = (diagonal - u_k * u_k).clamp_min(torch.finfo(a.dtype).tiny)
        norms = norms - 2 * u_k * z_k + c * u_k * u_k
        picked.append(p)
    a.addmm_(u.T, u, alpha=-1)
    half = z - 0.5 * curvature[:, None] * u  # G ← G − Uᵀ half − halfᵀ U
    g.addmm_(u.T, half, alpha=-1).addmm_(half.T, u, alpha=-1)
    return torch.stack(picked)


def unit_errors(weight: Tensor, inverse: Tensor, index: Tensor, score: HeadScore) -> Tensor:
    """Errors [units] of removing each unit of `index` [units, width] alone.

    exact: E(S). grouped_cholesky (SlimGPT, algorithm 1): Σ_j ‖w_j‖² / L_jj² with A_SS = L Lᵀ and w not updated.
    diagonal (its "−GCD" ablation): Σ_j ‖w_j‖² / A_jj.
    """
    blocks = inverse[index[:, :, None], index[:, None, :]]
    columns = weight.T[index]  # [units, width, d]
    if score == "diagonal":
        return (columns.square().sum(-1) / blocks.diagonal(dim1=1, dim2=2)).sum(-1)
    factors = torch.linalg.cholesky(blocks)
    if score == "grouped_cholesky":
        return (columns.square().sum(-1) / factors.diagonal(dim1=1, dim2=2).square()).sum(-1)
    return torch.linalg.solve_triangular(factors, columns, upper=False).square().sum((1, 2))


def choose_units(weight: Tensor, inverse: Tensor, index: Tensor, count: int, score: HeadScore) -> list[int]:
    """Greedy order in which whole units go, one at a time with an update of W and A after each."""
    w, a = weight.clone(), inverse.clone()
    alive = list(range(len(index)))
    order: list[int] = []
    for _ in range(count):
        errors = unit_errors(w, a, index[alive], score)
        unit = alive.pop(int(errors.argmin()))
        order.append(unit)
        columns = index[unit]
        factor = torch.linalg.cholesky(a[columns][:, columns])
        gain = torch.cholesky_solve(a[columns], factor)  # (A_SS)⁻¹ A_S:
        w = w - w[:, columns] @ gain
        a = a - a[:, columns] @ gain
        w[:, columns] = 0
    return order
