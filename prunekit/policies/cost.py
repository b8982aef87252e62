"""What a model costs as a function of how many units of each group are gone: the measure a target is stated in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from prunekit.graph import CouplingGraph


@dataclass(frozen=True, kw_only=True)
class Term:
    """coefficient · Π_i (sizes[i] − Σ over (group, i, width) of `cuts` of width · units removed from the group)."""

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
    """A sum of terms, and of a table per group: its cost with 0, 1, … num_units units kept, linear in between.

    `name` says what is counted: parameters, bytes, flops (of one forward pass) or latency (seconds of it). It must not
    rise when units go.
    """

    name: str
    terms: tuple[Term, ...]
    tables: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __call__(self, removed: Mapping[str, float]) -> float:
        """What is left to pay once so many (fractional) units of each group are gone."""
        return math.fsum(term(removed) for term in self.terms) + math.fsum(
            _interpolate(table, len(table) - 1 - removed.get(name, 0.0)) for name, table in self.tables.items()
        )


def weights_cost(graph: CouplingGraph, name: str = "parameters", each: Mapping[str, float] | None = None) -> Cost:
    """Number of parameters, tied ones once; `each` (parameter → factor) turns it into bytes or another weighted count.

    Parameters of whole layers are shared out equally over their stack, so that a layer counts as the mean one.
    """
    cuts: dict[str, list[tuple[str, int, int]]] = {parameter: [] for parameter in graph.shapes}
    for group in graph.groups:
        for member in group.members:
            cuts.setdefault(member.parameter, []).append((group.name, member.dim, member.index.shape[1]))
    terms = []
    for parameter in graph.shapes:
        if parameter not in graph.buffers:
            factor = 1.0 if each is None else each.get(parameter, 0.0)
            shape = graph.shapes[parameter]
            terms.append(Term(coefficient=factor, sizes=tuple(shape), cuts=tuple(cuts[parameter])))
    return Cost(name=name, terms=tuple(terms))


def _interpolate(table: tuple[float, ...], kept: float) -> float:
    low = min(int(kept), len(table) - 2)
    return table[low] + (table[low + 1] - table[low]) * (kept - low)
