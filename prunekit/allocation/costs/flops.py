"""Floating point operations of a forward pass, read off the axes of its products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from prunekit.allocation.costs.base import Cost, CostSetting
from prunekit.allocation.costs.forward import ForwardCost
from prunekit.allocation.costs.terms import terms_of
from prunekit.errors import TraceError
from prunekit.graph import CouplingGraph, trace


@dataclass(frozen=True, kw_only=True)
class Flops(ForwardCost):
    """Floating point operations of one forward pass, two to a multiply-add. Exact for any plan."""

    name: ClassVar[str] = "flops"

    def measure(self, setting: CostSetting) -> Cost:
        """Traced once more, with inputs of the size asked for; no weight is read."""
        return flops_cost(setting.model, setting.graph, self.example(setting))


def flops_cost(
    model: nn.Module, graph: CouplingGraph, example: Mapping[str, Any] | tuple[Any, ...]
) -> Cost:
    """Floating point operations (2 a multiply-add) of one forward pass on inputs like `example`.

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
            "flops: traced with these inputs the model has other groups than it had: "
            "is one of their axes of size 1?"
        )
    monomials = Counter({product.units: 2 * product.count for product in traced.products})
    return Cost(name="flops", terms=terms_of(graph, monomials))
