"""Choose the units that go (SlimGPT, section 4.2): heads singly, columns singly or in groups.

Next goes the unit S with the least Σ E(S) over all consumers of its group; then W and A of each
consumer are brought up to date (`prunekit.obs.inverse` has the equations).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor

from prunekit.obs.downdate import Downdate
from prunekit.obs.inverse import HeadScore, Problem, cholesky, unit_errors
from prunekit.obs.replay import capture

Groups = Literal["greedy", "dynamic_group", "released_group", "fixed_group"]
BLOCK = 128  # greedy steps between two updates of the whole A and WᵀW
_LARGEST, _SMALLEST = 1024, 8  # columns of a group, in the paper
_SHARE = 4  # a group takes a quarter of the columns that are left to remove
_RELEASED_OFFSET, _RELEASED_SMALLEST = 512, 64  # of the paper's released code
_FIXED = 128  # columns of every group in the paper's ablation


def choose_units(problems: Sequence[Problem], count: int, score: HeadScore) -> list[int]:
    """Choose `count` units of any width, the first to go first; every W and A follows each one.

    The device is waited for once, at the end. Should rounding have made a block indefinite by then,
    all is done again with blocks that are looked at one by one.
    """
    failed: list[Tensor] = []
    order = order_units(problems, count, score, failed)
    *units, failures = torch.cat([order, sum(failed, order.new_zeros(1))]).tolist()
    return order_units(problems, count, score).tolist() if failures else units


def order_units(
    problems: Sequence[Problem],
    count: int,
    score: HeadScore,
    failed: list[Tensor] | None = None,
) -> Tensor:
    """The units [count] that `choose_units` chooses; `failed` is that of `inverse.cholesky`."""
    work = [
        replace(p, weight=p.weight.to(p.inverse.dtype, copy=True), inverse=p.inverse.clone())
        for p in problems
    ]
    device = problems[0].index.device
    order = torch.zeros(count, dtype=torch.long, device=device)
    gone = torch.zeros(len(problems[0].index), dtype=torch.bool, device=device)
    for k in range(count):
        errors = unit_errors(work, score, failed).masked_fill_(gone, torch.inf)
        unit = torch.argmin(errors, 0, keepdim=True, out=order[k : k + 1])
        gone.index_fill_(0, unit, True)
        for problem in work if k + 1 < count else ():
            columns = problem.index.index_select(0, unit)[0]
            _remove(problem.weight, problem.inverse, columns, failed)
    return order


def _remove(weight: Tensor, inverse: Tensor, columns: Tensor, failed: list[Tensor] | None) -> None:
    """Remove `columns` [width] from W [d, n] and A [n, n], in place; A is one there afterwards."""
    rows = inverse[columns]
    gain = torch.cholesky_solve(rows, cholesky(rows[:, columns], failed))  # (A_SS)⁻¹ A_S:
    weight.addmm_(weight[:, columns], gain, alpha=-1)
    inverse.addmm_(rows.T, gain, alpha=-1)
    eye = torch.eye(len(columns), dtype=inverse.dtype, device=inverse.device)
    inverse[columns[:, None], columns] = eye  # so that the block of a removed unit has a factor


def choose_columns(problems: Sequence[Problem], count: int, groups: Groups = "greedy") -> list[int]:
    """Choose `count` units of width one, the first to go first: the least Σ ‖w_p‖² / A_pp.

    With `groups` greedy they go one at a time, and each choice is exact. The other ways remove the
    best k columns at once, with k from `dynamic_sizes`, `released_sizes` or `fixed_sizes`. On a CPU
    each problem takes one more matrix [n, n] beside A, and some rows of it; elsewhere two more.
    """
    return order_columns(problems, count, groups).tolist() if count else []


def order_columns(problems: Sequence[Problem], count: int, groups: Groups = "greedy") -> Tensor:
    """The columns [count ≥ 1] that `choose_columns` chooses; greedy never waits for the device."""
    block = min(BLOCK, count) if groups == "greedy" else 0
    work = [Downdate(problem, block) for problem in problems]
    units = torch.stack([downdate.unit for downdate in work])
    pick = Picker(work, units / units.max())
    order: list[Tensor] = []
    left = count
    for size in SIZES[groups](count):
        picked = pick.greedily(size) if groups == "greedy" else pick.at_once(size)
        order.append(work[0].alive[picked])
        left -= size
        for downdate in work if left else ():
            if groups == "greedy":
                downdate.settle(picked)
            else:
                downdate.remove_group(picked)
    return torch.cat(order)


class Picker:
    """Picks the next columns by their errors, summed over the consumers.

    Attributes:
        work: a downdate for each consumer; greedy picking removes what it picks from them.
        shares: [consumers], their units as shares of one common unit.
    """

    def __init__(self, work: Sequence[Downdate], shares: Tensor) -> None:
        self.work, self.shares = work, shares
        self._picked = torch.empty(work[0].block, dtype=torch.long, device=shares.device)
        self._blocks = 0
        self._replay: Callable[[], None] | None = None

    def greedily(self, size: int) -> Tensor:
        """Remove the next `size` columns one after another; at most a block of them.

        From the second block on all steps of a block are one CUDA graph, where there are such. The
        last block may then take some steps more than it has to: nobody looks at what they do.
        """
        if self._blocks == 1:
            self._replay = capture(self._run, self.shares.device)
        self._blocks += 1
        if self._replay is not None:
            self._replay()
        else:
            self._run(size)
        return self._picked[:size].clone()

    def _run(self, size: int | None = None) -> None:
        """Take the steps of a block, all of them or the first `size`."""
        for k in range(len(self._picked) if size is None else size):
            p = self._picked[k : k + 1]
            torch.argmin(self._total(), 0, keepdim=True, out=p)
            for downdate in self.work:
                downdate.remove(k, p)

    def at_once(self, size: int) -> Tensor:
        """The `size` columns that have the least errors now, the least first."""
        return self._total().topk(size, largest=False).indices

    def _total(self) -> Tensor:
        """The errors of the columns [n], in one common unit."""
        errors = self.work[0].errors
        if len(self.work) == 1:
            return errors
        rest = (
            share * downdate.errors
            for share, downdate in zip(self.shares[1:], self.work[1:], strict=True)
        )
        return sum(rest, self.shares[0] * errors.double())


def _cap(sizes: Iterator[int], count: int) -> Iterator[int]:
    """Pass `sizes` on until they add up to `count`, the last one cut to fit."""
    while count > 0:
        size = min(next(sizes), count)
        yield size
        count -= size


def greedy_sizes(count: int) -> Iterator[int]:
    """Greedy steps between two updates of the whole A and WᵀW."""
    return _cap(repeat(BLOCK), count)


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
