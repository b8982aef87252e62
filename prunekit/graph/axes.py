"""The algebra of axes: what every position of a tensor axis belongs to.

An axis is a row-major product of factors; a factor is an atom or a sum (concatenation) of axes.
Operators unify, split and rearrange these trees; a union-find binds an atom to another atom or to a
tree of its size. At the end each atom left is one dimension that can be pruned, and the trees say
which positions of which tensor each of its indices owns.

    q rows of a grouped-query attention     (kv, rep, head_dim)
    a fused QKV's rows                      (q ⊕ k ⊕ v)
    rotary's two halves                     (h ⊕ h)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, product

import torch
from torch import Tensor

DIAGONAL = -2
_ids = count()


@dataclass(eq=False, slots=True)
class Atom:
    """A dimension of `size` indices; `bound` replaces it once it is known to be something finer.

    `pinned` says why it must keep its size, `inexact` why cutting it changes the other outputs;
    `tags` carry what the operators saw of it ("attention", "broadcast", "residual").
    """

    size: int
    bound: Axis | None = None
    pinned: str | None = None
    inexact: str | None = None
    tags: set[str] = field(default_factory=set)
    id: int = field(default_factory=lambda: next(_ids))


@dataclass(frozen=True, eq=False, slots=True)
class Sum:
    """The concatenation of axes."""

    parts: tuple[Axis, ...]


Factor = Atom | Sum
Axis = tuple[Factor, ...]


def fresh(size: int, pinned: str | None = None) -> Axis:
    """A new axis of one atom; the empty product where the size is 1."""
    return () if size == 1 else (Atom(size, pinned=pinned),)


def factor_size(factor: Factor) -> int:
    """Number of positions of a factor."""
    return (
        factor.size if isinstance(factor, Atom) else sum(axis_size(part) for part in factor.parts)
    )


def axis_size(axis: Axis) -> int:
    """Number of positions of an axis."""
    return math.prod(factor_size(factor) for factor in axis)


def resolve(axis: Axis) -> Axis:
    """The axis with every bound atom replaced by what it is bound to, in normal form."""
    factors: list[Factor] = []
    for factor in axis:
        if isinstance(factor, Sum):
            factors.extend(_concatenate([resolve(part) for part in factor.parts]))
        elif factor.bound is None:
            factors.append(factor)
        else:
            factor.bound = resolve(factor.bound)  # path compression
            factors.extend(factor.bound)
    return tuple(factors)


def _concatenate(parts: list[Axis]) -> Axis:
    """The concatenation of resolved axes, nested sums opened."""
    flat: list[Axis] = []
    for part in (part for part in parts if axis_size(part)):
        only = part[0] if len(part) == 1 else None
        flat.extend(only.parts if isinstance(only, Sum) else [part])
    if not flat:
        return fresh(0)
    return flat[0] if len(flat) == 1 else (Sum(tuple(flat)),)


def concatenate(axes: list[Axis]) -> Axis:
    """The axis that lists the positions of `axes` one after another."""
    return _concatenate([resolve(axis) for axis in axes])


def atoms(axis: Axis) -> Iterator[Atom]:
    """Every atom of the resolved axis, repeats included."""
    for factor in resolve(axis):
        if isinstance(factor, Atom):
            yield factor
        else:
            for part in factor.parts:
                yield from atoms(part)


def pin(axis: Axis, reason: str) -> None:
    """Fix the size of everything in the axis; the first reason stays."""
    for atom in atoms(axis):
        atom.pinned = atom.pinned or reason


def mark_inexact(axis: Axis, reason: str, *, weights: bool = False) -> None:
    """Note that an operator mixes the positions of this axis (a mean, a norm, a softmax).

    `weights` tells whether these are positions of a weight, from which another weight is computed.
    """
    for atom in atoms(axis):
        atom.inexact = atom.inexact or reason
        atom.tags.add("computed" if weights else "mixed")


def tag(axis: Axis, name: str) -> None:
    """Tag every atom of the axis."""
    for atom in atoms(axis):
        atom.tags.add(name)


def _bind(atom: Atom, axis: Axis) -> None:
    """Make `atom` stand for `axis`, which inherits what is known of it."""
    axis = resolve(axis)
    targets = list(atoms(axis))
    if any(target is atom for target in targets):
        if len(axis) > 1 or axis[0] is not atom:
            pin((atom,), "its axis would have to contain itself")
        return
    for target in targets:
        target.pinned = target.pinned or atom.pinned
        target.inexact = target.inexact or atom.inexact
        target.tags |= atom.tags
    atom.bound = axis


def unify(left: Axis, right: Axis) -> None:
    """Declare that two axes of one size run over the same things, position by position.

    Where the trees can't be aligned (a border inside a concatenation), everything in both is
    pinned: never a guess.
    """
    left, right = resolve(left), resolve(right)
    assert axis_size(left) == axis_size(right), (
        f"axes of sizes {axis_size(left)} and {axis_size(right)}"
    )
    while left and right:
        head, other = left[0], right[0]
        size, other_size = factor_size(head), factor_size(other)
        if head is other:
            left, right = left[1:], right[1:]
        elif size == other_size:
            _unify_factors(head, other)
            left, right = resolve(left[1:]), resolve(right[1:])
        elif size > other_size and size % other_size == 0 and isinstance(head, Atom):
            _bind(head, fresh(other_size) + fresh(size // other_size))
            left, right = resolve(left), resolve(right)
        elif other_size > size and other_size % size == 0 and isinstance(other, Atom):
            left, right = right, left
        elif len(left) == 1 and isinstance(head, Sum):
            _unify_parts(head, right)
            return
        elif len(right) == 1 and isinstance(other, Sum):
            _unify_parts(other, left)
            return
        else:
            for axis in (left, right):
                pin(axis, "its axes can't be aligned")
            return


def _unify_factors(left: Factor, right: Factor) -> None:
    if isinstance(left, Atom):
        _bind(left, (right,))
    elif isinstance(right, Atom):
        _bind(right, (left,))
    else:
        _unify_parts(left, (right,))


def _unify_parts(total: Sum, axis: Axis) -> None:
    """Unify a concatenation with an axis, cutting that at the borders of the parts."""
    rest = axis
    for part in total.parts[:-1]:
        head, rest = cut(rest, axis_size(part))
        unify(part, head)
    unify(total.parts[-1], rest)


def cut(axis: Axis, offset: int) -> tuple[Axis, Axis]:
    """The first `offset` positions of an axis, and the others; either may be empty."""
    axis = resolve(axis)
    if offset == 0:
        return fresh(0, "an empty part"), axis
    if offset == axis_size(axis):
        return axis, fresh(0, "an empty part")
    assert 0 < offset < axis_size(axis)
    head, tail = axis[0], axis[1:]
    stride = axis_size(tail)
    if offset % stride:
        pin(axis, "it is cut in the middle of a unit")
        return fresh(offset, "cut in the middle of a unit"), fresh(
            axis_size(axis) - offset, "cut in the middle of a unit"
        )
    offset //= stride
    if isinstance(head, Atom):
        before, after = fresh(offset), fresh(head.size - offset)
        _bind(head, (Sum((before, after)),))
    else:
        before, after = _cut_parts(head.parts, offset)
    return resolve(before + tail), resolve(after + tail)


def _cut_parts(parts: tuple[Axis, ...], offset: int) -> tuple[Axis, Axis]:
    for i, part in enumerate(parts):
        size = axis_size(part)
        if offset == size:
            return concatenate(list(parts[: i + 1])), concatenate(list(parts[i + 1 :]))
        if offset < size:
            before, after = cut(part, offset)
            return concatenate([*parts[:i], before]), concatenate([after, *parts[i + 1 :]])
        offset -= size
    raise AssertionError("offset past the end")


def regroup(axes: list[Axis], sizes: list[int]) -> list[Axis]:
    """Reshape: divide the row-major product of `axes` anew into axes of `sizes`.

    Atoms are split at the new borders.
    """
    factors = resolve(tuple(factor for axis in axes for factor in axis))
    grouped: list[Axis] = []
    for size in sizes:
        taken: list[Factor] = []
        while axis_size(tuple(taken)) < size:
            head, factors = factors[0], factors[1:]
            missing = size // axis_size(tuple(taken))
            whole = factor_size(head)
            if whole > missing:
                if whole % missing == 0 and isinstance(head, Atom):
                    _bind(head, fresh(missing) + fresh(whole // missing))
                    head, *rest = resolve((head,))
                    factors = resolve((*rest, *factors))
                else:
                    return _give_up(axes, sizes)
            taken.append(head)
        if axis_size(tuple(taken)) != size:
            return _give_up(axes, sizes)
        grouped.append(tuple(taken))
    # A bound atom may stand in a group made earlier.
    return [resolve(axis) for axis in grouped]


def _give_up(axes: list[Axis], sizes: list[int]) -> list[Axis]:
    for axis in axes:
        pin(axis, "a reshape puts a border inside it")
    return [fresh(size, "made by a reshape across borders") for size in sizes]


def monomials(axes: Iterable[Axis], variables: Container[Atom]) -> dict[tuple[Atom, ...], int]:
    """The number of positions of a product of axes, as a polynomial in the sizes of `variables`.

    Returns:
        Product of variables → its coefficient.
    """
    polynomial: dict[tuple[Atom, ...], int] = {(): 1}
    for factor in (factor for axis in axes for factor in resolve(axis)):
        if isinstance(factor, Sum):
            terms = Counter[tuple[Atom, ...]]()
            for part in factor.parts:
                terms.update(monomials([part], variables))
        else:
            terms = Counter({(factor,): 1} if factor in variables else {(): factor.size})
        expanded = Counter[tuple[Atom, ...]]()
        for (left, a), (right, b) in product(polynomial.items(), terms.items()):
            expanded[tuple(sorted(left + right, key=lambda atom: atom.id))] += a * b
        polynomial = expanded
    return polynomial


def owners(axis: Axis, atom: Atom) -> Tensor:
    """Int64 [size]: the index of `atom` that each position belongs to, −1 where to none.

    All `DIAGONAL` where the atom stands twice in one product: no slice of the axis removes one of
    its indices.
    """
    result = torch.zeros(1, dtype=torch.long)
    found = False
    for factor in resolve(axis):
        if factor is atom:
            own = torch.arange(factor.size)
        elif isinstance(factor, Sum):
            own = torch.cat([owners(part, atom) for part in factor.parts])
        else:
            own = torch.full((factor.size,), -1)
        mine = bool((own != -1).any())
        if (mine and found) or bool((own == DIAGONAL).any()):
            return torch.full((axis_size(axis),), DIAGONAL)
        if mine:
            result = own.repeat(len(result))
        else:
            result = result.repeat_interleave(len(own))
        found = found or mine
    return result if found else torch.full((axis_size(axis),), -1)
