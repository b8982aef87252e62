"""Floating point operations of a forward pass, read off the axes of its products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from prunekit.allocation.costs.base import Cost, terms_of
from prunekit.errors import TraceError
from prunekit.graph import CouplingGraph, trace


def flops_cost(
    model: nn.Module, graph: CouplingGraph, example: Mapping[str, Any] | tuple[Any, ...]
) -> Cost:
    """Floating point operations (2 a multiply-add) of one forward pass on inputs shaped like
    `example`'s.

    Every matrix product, convolution and attention that a weight takes part in is counted by its
    axes, each as long as the groups leave it, so that the count is exact for any plan; so are the
    chosen experts of a mixture, however many there are to choose from. Embeddings are looked up for
    nothing. No weight is read.

    Raises:
        TraceError: traced with these inputs the model has other groups than `graph`.
    """
    traced = trace(model, example)
    if traced.fingerprint != graph.fingerprint:
        raise TraceError(
            "flops: traced with these inputs the model has other groups than it had (an axis of size 1?)"
        )
    monomials = Counter({product.units: 2 * product.count for product in traced.products})
    return Cost(name="flops", terms=terms_of(graph, monomials))
