"""The number of parameters, weighted or not, however groups overlap in a matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import product

import torch

from prunekit.allocation.costs.base import Cost
from prunekit.allocation.costs.terms import Monomials, terms_of
from prunekit.graph import CouplingGraph, Member


def weights_cost(
    graph: CouplingGraph, name: str = "parameters", each: Mapping[str, float] | None = None
) -> Cost:
    """The number of parameters, tied ones once; or with `each` (parameter → factor) their sizes.

    Exact however groups overlap: a row of queries that a key-value head and a query head both own
    goes once. A layer of a stack counts as the mean layer.
    """
    members: dict[tuple[str, int], list[tuple[str, Member]]] = defaultdict(list)
    for group in graph.groups:
        for member in group.members:
            members[member.parameter, member.dim].append((group.name, member))
    monomials: dict[tuple[str, ...], float] = defaultdict(float)
    for parameter, shape in graph.shapes.items():
        factor = 1.0 if each is None else each.get(parameter, 0.0)
        if parameter not in graph.buffers and factor:
            dims = [
                _count_kept(size, members[parameter, dim]).items() for dim, size in enumerate(shape)
            ]
            stacks = [stack for stack in graph.stacks if parameter.startswith(f"{stack.module}.")]
            dims += [{(stack.name,): 1 / stack.num_units}.items() for stack in stacks]
            for combination in product(*dims):
                names = tuple(sorted(name for owners, _ in combination for name in owners))
                monomials[names] += factor * math.prod(count for _, count in combination)
    return Cost(name=name, terms=terms_of(graph, monomials), stored=True)


def _count_kept(size: int, members: list[tuple[str, Member]]) -> Monomials:
    """How many positions of a dim stay, as a polynomial in the units kept.

    Positions that the same groups own stay in proportion to the product of the shares that these
    groups keep.
    """
    owners = torch.zeros(size, dtype=torch.int64)  # a bit for each group that owns the position
    for bit, (_, member) in enumerate(members):
        owners[member.index.flatten()] += 1 << bit
    kept: dict[tuple[str, ...], float] = defaultdict(float)
    sets, counts = owners.unique(return_counts=True)
    for bits, count in zip(sets.tolist(), counts.tolist(), strict=True):
        here = [(name, member) for bit, (name, member) in enumerate(members) if bits >> bit & 1]
        units = math.prod(len(member.index) for _, member in here)
        kept[tuple(name for name, _ in here)] += count / units
    return kept
