"""What is coupled to what: a tracer for any `nn.Module`."""

from prunekit.graph import rules
from prunekit.graph.groups import CoupledGroup, CouplingGraph, Extent, Member, trace
from prunekit.graph.operators import Call, Value, operator_rule

__all__ = [
    "Call",
    "CoupledGroup",
    "CouplingGraph",
    "Extent",
    "Member",
    "Value",
    "operator_rule",
    "rules",
    "trace",
]
