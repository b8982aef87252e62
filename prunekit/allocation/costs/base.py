"""What a model costs as a function of how many units of each group are gone: the measure a target
is stated in.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

import torch

from prunekit.graph import CouplingGraph, Member

Monomials = Mapping[
    tuple[str, ...], float
]  # names of groups, sorted → coefficient of the product of their kept units


@dataclass(frozen=True, kw_only=True)
class Term:
    """coefficient · Π_i (sizes[i] − Σ over (group, i, width) of `cuts` of width · units removed
    from the group).
    """

    coefficient: float
    sizes: tuple[int, ...]
    cuts: tuple[tuple[str, int, int], ...]

    def __call__(self, removed: Mapping[str, float]) -> float:
        """Its value once so many (fractional) units of each group are gone."""
        kept = [float(size) for size in self.sizes]
        for name, i, width in self.cuts:
            kept[i] -= width * removed.get(name, 0.0)
        return self.coefficient * math.prod(kept)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A sum of terms, and of a table per group: its cost with 0, 1, … num_units units kept, linear
    in between.

    `name` says what is counted: parameters, bytes, flops (of one forward pass) or latency (seconds
    of it). It must not rise when units go.
    """

    name: str
    terms: tuple[Term, ...]
    tables: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __call__(self, removed: Mapping[str, float]) -> float:
        """What is left to pay once so many (fractional) units of each group are gone."""
        return math.fsum(term(removed) for term in self.terms) + math.fsum(
            _interpolate(table, len(table) - 1 - removed.get(name, 0.0))
            for name, table in self.tables.items()
        )


def terms_of(graph: CouplingGraph, monomials: Monomials) -> tuple[Term, ...]:
    """A polynomial in the units kept as terms; groups that can't be pruned are constants in it."""
    constants = {group.name for group in graph.by_name.values() if not group.prunable}
    merged: dict[tuple[str, ...], float] = defaultdict(float)
    for names, coefficient in monomials.items():
        fixed = math.prod(graph[name].num_units for name in names if name in constants)
        merged[tuple(name for name in names if name not in constants)] += coefficient * fixed
    return tuple(
        Term(
            coefficient=coefficient,
            sizes=tuple(graph[name].num_units for name in names),
            cuts=tuple((name, i, 1) for i, name in enumerate(names)),
        )
        for names, coefficient in merged.items()
        if coefficient
    )


def weights_cost(
    graph: CouplingGraph, name: str = "parameters", each: Mapping[str, float] | None = None
) -> Cost:
    """Number of parameters, tied ones once; `each` (parameter → factor) turns it into bytes or
    another weighted count.

    Exact however groups overlap: rows of queries owned by a key-value head and by a query head of
    each go once. A layer of a stack counts as the mean one.
    """
    members: dict[tuple[str, int], list[tuple[str, Member]]] = defaultdict(list)
    for group in graph.groups:
        for member in group.members:
            members[member.parameter, member.dim].append((group.name, member))
    monomials: dict[tuple[str, ...], float] = defaultdict(float)
    for parameter, shape in graph.shapes.items():
        factor = 1.0 if each is None else each.get(parameter, 0.0)
        if parameter not in graph.buffers and factor:
            dims = [_kept(size, members[parameter, dim]).items() for dim, size in enumerate(shape)]
            stacks = [stack for stack in graph.stacks if parameter.startswith(f"{stack.module}.")]
            dims += [{(stack.name,): 1 / stack.num_units}.items() for stack in stacks]
            for combination in product(*dims):
                names = tuple(sorted(name for owners, _ in combination for name in owners))
                monomials[names] += factor * math.prod(count for _, count in combination)
    return Cost(name=name, terms=terms_of(graph, monomials))


def _kept(size: int, members: list[tuple[str, Member]]) -> Monomials:
    """How many positions of a dim stay: those of one set of owners stay as the product of the
    owners' shares kept.
    """
    owned = torch.zeros(size, dtype=torch.int64)
    for bit, (_, member) in enumerate(members):
        owned[member.index.flatten()] += 1 << bit
    kept: dict[tuple[str, ...], float] = defaultdict(float)
    for owners, count in zip(*(t.tolist() for t in owned.unique(return_counts=True)), strict=True):
        here = [(name, member) for bit, (name, member) in enumerate(members) if owners >> bit & 1]
        units = math.prod(len(member.index) for _, member in here)
        kept[tuple(name for name, _ in here)] += count / units
    return kept


def _interpolate(table: tuple[float, ...], kept: float) -> float:
    low = min(int(kept), len(table) - 2)
    return table[low] + (table[low + 1] - table[low]) * (kept - low)
