"""Choose the units that go (SlimGPT, section 4.2): heads singly, columns singly or in groups.

Next goes the unit S with the least Σ E(S) over all consumers of its group; then W and A of each
consumer are brought up to date (`prunekit.obs.inverse` has the equations).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

from prunekit.obs.downdate import Downdate, vacancies
from prunekit.obs.inverse import HeadScore, Problem, cholesky, unit_errors

Groups = Literal["greedy", "dynamic_group", "released_group", "fixed_group"]
_BLOCK = 256  # greedy steps between two updates of the whole A and WᵀW
_LARGEST, _SMALLEST = 1024, 8  # columns of a group, in the paper
_SHARE = 4  # a group takes a quarter of the columns that are left to remove
_RELEASED_OFFSET, _RELEASED_SMALLEST = 512, 64  # of the paper's released code
_FIXED = 128  # columns of every group in the paper's ablation


def choose_units(problems: Sequence[Problem], count: int, score: HeadScore) -> list[int]:
    """Choose `count` units of any width, the first to go first; every W and A follows each one."""
    work = [
        replace(p, weight=p.weight.to(p.inverse.dtype, copy=True), inverse=p.inverse.clone())
        for p in problems
    ]
    alive = list(range(len(problems[0].index)))
    order: list[int] = []
    while len(order) < count:
        errors = unit_errors([replace(p, index=p.index[alive]) for p in work], score)
        order.append(alive.pop(int(errors.argmin())))
        if len(order) < count:
            for problem in work:
                _remove(problem.weight, problem.inverse, problem.index[order[-1]])
    return order


def _remove(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Remove `columns` [width] from W [d, n] and A [n, n], in place."""
    rows = inverse[columns]
    gain = torch.cholesky_solve(rows, cholesky(rows[:, columns]))  # (A_SS)⁻¹ A_S:
    weight.addmm_(weight[:, columns], gain, alpha=-1)
    inverse.addmm_(rows.T, gain, alpha=-1)


def choose_columns(problems: Sequence[Problem], count: int, groups: Groups = "greedy") -> list[int]:
    """Choose `count` units of width one, the first to go first: the least Σ ‖w_p‖² / A_pp.

    With `groups` greedy they go one at a time, and each choice is exact. The other ways remove the
    best k columns at once, with k from `dynamic_sizes`, `released_sizes` or `fixed_sizes`. Each
    problem takes one more matrix [n, n] beside A, and some rows of it.
    """
    block = min(_BLOCK, count)
    work = [Downdate(problem, block) for problem in problems]
    shares = [d.unit / max(e.unit for e in work) for d in work]
    alive = torch.arange(len(problems[0].index), device=problems[0].index.device)
    order: list[Tensor] = []
    for size in SIZES[groups](count):
        picked = _greedy(work, shares, size) if groups == "greedy" else _at_once(work, shares, size)
        order.append(alive[picked])
        if sum(map(len, order)) < count:
            holes, movers = vacancies(picked, len(alive))
            for downdate in work:
                downdate.settle(holes, movers)
            alive[holes] = alive[movers]
            alive = alive[: len(alive) - size]
    return torch.cat(order).tolist() if order else []


def _greedy(work: Sequence[Downdate], shares: Sequence[float], size: int) -> Tensor:
    """Remove the next `size` columns, one after another; nothing waits for the device."""
    picked = []
    for _ in range(size):
        picked.append(_total(work, shares).argmin(0, keepdim=True))
        for downdate in work:
            downdate.remove(picked[-1])
    return torch.cat(picked)


def _at_once(work: Sequence[Downdate], shares: Sequence[float], size: int) -> Tensor:
    """Remove the `size` columns that have the least errors now, the least first."""
    picked = _total(work, shares).topk(size, largest=False).indices
    for downdate in work:
        downdate.remove_group(picked)
    return picked


def _total(work: Sequence[Downdate], shares: Sequence[float]) -> Tensor:
    """The errors of the columns [n], summed over the consumers in one common unit."""
    errors = work[0].errors()
    if len(work) == 1:
        return errors
    rest = (share * downdate.errors() for share, downdate in zip(shares[1:], work[1:], strict=True))
    return sum(rest, shares[0] * errors.double())


def _cap(sizes: Iterator[int], count: int) -> Iterator[int]:
    """Pass `sizes` on until they add up to `count`, the last one cut to fit."""
    while count > 0:
        size = min(next(sizes), count)
        yield size
        count -= size


def greedy_sizes(count: int) -> Iterator[int]:
    """Greedy steps between two updates of the whole A and WᵀW."""
    return _cap(repeat(_BLOCK), count)


def dynamic_sizes(count: int) -> Iterator[int]:
    """SlimGPT's Dynamic Group Size, which shrinks from 1,024 at most to 8.

    The paper does not say how. Here each group is a quarter of the columns that are left to remove:
    the first is no more than a quarter of `count`, and the last columns, which cost the most, go 8
    at a time.
    """
    while count > 0:
        size = min(max(min(count // _SHARE, _LARGEST), _SMALLEST), count)
        yield size
        count -= size


def released_sizes(count: int) -> Iterator[int]:
    """The sizes of the released code: k₁ = (count − 512) / 2, k ← (k − 512) / 2, in [64, 1024]."""
    return _cap(_shrink_sizes(count), count)


def _shrink_sizes(k: int) -> Iterator[int]:
    """The sizes of the released code without an end."""
    while True:
        k = (k - _RELEASED_OFFSET) // 2
        yield min(max(k, _RELEASED_SMALLEST), _LARGEST)


def fixed_sizes(count: int) -> Iterator[int]:
    """The sizes of the paper's "−DGS" ablation: 128 columns at a time."""
    return _cap(repeat(_FIXED), count)


SIZES = {
    "greedy": greedy_sizes,
    "dynamic_group": dynamic_sizes,
    "released_group": released_sizes,
    "fixed_group": fixed_sizes,
}
