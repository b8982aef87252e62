"""What is coupled to what: a tracer for any `nn.Module`."""

from prunekit.graph import rules
from prunekit.graph.coupling import CouplingGraph, Extent, Product
from prunekit.graph.groups import CoupledGroup, Group, LayerStack, Member
from prunekit.graph.operators import Call, Value, operator_rule
from prunekit.graph.tracer import trace

__all__ = [
    "Call",
    "CoupledGroup",
    "CouplingGraph",
    "Extent",
    "Group",
    "LayerStack",
    "Member",
    "Product",
    "Value",
    "operator_rule",
    "rules",
    "trace",
]
