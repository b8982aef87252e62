"""Costs: what the pruned model has to be cheap in. One backend a file; `base` says what one is."""

from prunekit.allocation.costs.base import Cost, CostModel, CostSetting, Term
from prunekit.allocation.costs.bytes import Bytes
from prunekit.allocation.costs.flops import Flops
from prunekit.allocation.costs.latency import Latency
from prunekit.allocation.costs.parameters import Parameters
from prunekit.allocation.costs.terms import terms_of

__all__ = [
    "Bytes",
    "Cost",
    "CostModel",
    "CostSetting",
    "Flops",
    "Latency",
    "Parameters",
    "Term",
    "terms_of",
]
