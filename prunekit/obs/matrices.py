"""A and G = WᵀW of the columns that are there, as a place to read rows from and to fold steps into.

A CPU keeps half of each symmetric matrix and lets removed columns go, which saves memory and work.
Elsewhere a step must take few operations, each of which says only once what it works on: both
matrices are whole, and removed columns stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

_PANEL = 512  # the most columns of a panel; fewer than 4,096 columns make eight panels
_CHUNK = 1024  # rows that are gathered at once


class Matrices(Protocol):
    """A [n, n] and G [n, n]; some parts of `a` and `g` may not be valid.

    Attributes:
        n: number of columns.
    """

    n: int

    @property
    def a(self) -> Tensor:
        """A [n, n]; its diagonal is valid."""

    @property
    def g(self) -> Tensor:
        """G [n, n]; its diagonal is valid."""

    def scale(self, a: Tensor, g: Tensor) -> None:
        """Multiply A and G by two numbers."""

    def read(self, p: Tensor, into: Tensor) -> None:
        """Write the row `p` [1] of A and of G `into` [2, n]."""

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows `index` [m] of A and of G, each [m, n]."""

    def let_go(self, picked: Tensor, vectors: Tensor) -> Tensor | None:
        """Let the columns `picked` [k] go, in A, in G and in `vectors` [rows, n], if any go at all.

        Returns:
            The columns [n − k] that are left, in their new order; None where all stay.
        """

    def fold(self, left: Tensor, right: Tensor, other: Tensor) -> None:
        """A ← A + leftᵀ right and G ← G + otherᵀ right + rightᵀ other, for factors [k, n]."""


def hold(inverse: Tensor, weight: Tensor, columns: Tensor) -> Matrices:
    """A and G = WᵀW of some `columns` [n], in the form that suits the device."""
    return (Halves if inverse.device.type == "cpu" else Wholes)(inverse, weight, columns)


class Wholes:
    """Rows of A and of G side by side, `store` [n, 2, n]: one operation reads both."""

    def __init__(self, inverse: Tensor, weight: Tensor, columns: Tensor) -> None:
        self.n = len(columns)
        self.store = inverse.new_empty(self.n, 2, self.n)
        for lo in range(0, self.n, _CHUNK):
            rows = inverse.index_select(0, columns[lo : lo + _CHUNK])
            torch.index_select(rows, 1, columns, out=self.a[lo : lo + _CHUNK])
        weight = weight.index_select(1, columns).to(inverse.dtype)
        self.g.addmm_(weight.T, weight, beta=0)

    @property
    def a(self) -> Tensor:
        """A [n, n]."""
        return self.store[:, 0]

    @property
    def g(self) -> Tensor:
        """G [n, n]."""
        return self.store[:, 1]

    def scale(self, a: Tensor, g: Tensor) -> None:
        """Multiply A and G by two numbers."""
        self.store.mul_(torch.stack([a, g]).to(self.store.dtype)[:, None])

    def read(self, p: Tensor, into: Tensor) -> None:
        """Write the row `p` [1] of A and of G `into` [2, n]."""
        torch.index_select(self.store, 0, p, out=into[None])

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows `index` [m] of A and of G, each [m, n]."""
        return self.a.index_select(0, index), self.g.index_select(0, index)

    def let_go(self, picked: Tensor, vectors: Tensor) -> Tensor | None:
        """All columns stay."""
        return None

    def fold(self, left: Tensor, right: Tensor, other: Tensor) -> None:
        """A ← A + leftᵀ right and G ← G + otherᵀ right + rightᵀ other, for factors [k, n]."""
        self.a.addmm_(left.T, right)
        self.g.addmm_(other.T, right).addmm_(right.T, other)


class Halves:
    """Two symmetric matrices in the room of one, for a CPU.

    Columns are divided into panels of P. Where i and j lie in panels I ≥ J, A_ij is `store[i, j]`
    and G_ij is `store[j, i + P]`, in a `store` [n, n + P]: only half of each matrix is kept and
    computed.
    """

    def __init__(self, inverse: Tensor, weight: Tensor, columns: Tensor) -> None:
        self.n, self.panel = len(columns), _panel(len(columns))
        self.store = inverse.new_empty(self.n, self.n + self.panel)
        whole = self.n == len(inverse) and bool((columns == torch.arange(self.n)).all())
        weight = weight.to(inverse.dtype)
        weight = weight if whole else weight[:, columns]
        for lo, hi in self._bounds():
            rows = inverse[lo:hi, :hi] if whole else inverse[columns[lo:hi, None], columns[:hi]]
            self.a[lo:hi, :hi] = rows
            self.g[lo:, lo:hi].addmm_(weight[:, lo:].T, weight[:, lo:hi], beta=0)

    @property
    def a(self) -> Tensor:
        """A [n, n]; only panels I ≥ J are valid."""
        return self.store[: self.n, : self.n]

    @property
    def g(self) -> Tensor:
        """G [n, n]; only panels I ≥ J are valid."""
        return self.store[: self.n, self.panel : self.n + self.panel].T

    def scale(self, a: Tensor, g: Tensor) -> None:
        """Multiply A and G by two numbers."""
        for lo, hi in self._bounds():
            self.a[lo:, lo:hi].mul_(a)
            self.g[lo:, lo:hi].mul_(g)

    def _bounds(self) -> list[tuple[int, int]]:
        return [(lo, min(lo + self.panel, self.n)) for lo in range(0, self.n, self.panel)]

    def read(self, p: Tensor, into: Tensor) -> None:
        """Write the row `p` [1] of A and of G `into` [2, n]."""
        at, n, panel = int(p), self.n, self.panel  # a CPU need not wait for its own numbers
        lo = at // panel * panel
        hi = min(lo + panel, n)
        into[0, :hi], into[1, lo:] = self.store[at, :hi], self.store[at, panel + lo : panel + n]
        if hi < n:
            into[0, hi:] = self.store[hi:n, at]
        if lo:
            into[1, :lo] = self.store[:lo, panel + at]

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows `index` [m] of A and of G, each [m, n]."""
        rows = self.store.new_empty(2, len(index), self.n)
        for lo, hi, here in self._by_panel(index):
            at = index[here]
            a, g = self.store[at, :hi], self.store[at, self.panel + lo : self.panel + self.n]
            rows[0, here] = torch.cat([a, self.store[hi : self.n, at].T], dim=1)
            rows[1, here] = torch.cat([self.store[:lo, at + self.panel].T, g], dim=1)
        return rows[0], rows[1]

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

    def let_go(self, picked: Tensor, vectors: Tensor) -> Tensor:
        """Fill the places that the columns `picked` [k] leave with the last columns."""
        holes, movers = vacancies(picked, self.n)
        vectors[:, holes] = vectors[:, movers]
        rows = torch.stack(self.rows(movers))
        rows[..., holes] = rows[..., movers]
        order = torch.arange(self.n)
        order[holes] = movers
        self.n -= len(picked)
        self._write(holes, rows[..., : self.n])
        return order[: self.n]

    def fold(self, left: Tensor, right: Tensor, other: Tensor) -> None:
        """A ← A + leftᵀ right and G ← G + otherᵀ right + rightᵀ other, for factors [k, n]."""
        for lo, hi in self._bounds():
            self.a[lo:, lo:hi].addmm_(left[:, lo:].T, right[:, lo:hi])
            g = self.g[lo:, lo:hi]
            g.addmm_(other[:, lo:].T, right[:, lo:hi]).addmm_(right[:, lo:].T, other[:, lo:hi])


def _panel(n: int) -> int:
    """Columns of a panel, for n columns in all."""
    return min(max(n // 8, 64), _PANEL, n)


def vacancies(picked: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The holes that removing `picked` [k] of n columns leaves, and the columns that fill them.

    Holes are the places [m] that come free among the first n − k; movers are the columns [m] that
    stay behind these places.
    """
    n -= len(picked)
    stays = torch.ones(len(picked), dtype=torch.bool)
    stays[picked[picked >= n] - n] = False
    return picked[picked < n], stays.nonzero()[:, 0] + n
