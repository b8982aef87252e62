"""Polynomials in the numbers of units kept, as the terms of a cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from prunekit.allocation.costs.base import Term
from prunekit.graph import CouplingGraph

# Names of groups, sorted → the coefficient of the product of their numbers of units kept.
Monomials = Mapping[tuple[str, ...], float]


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
