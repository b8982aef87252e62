"""What is coupled to what: a tracer for any `nn.Module`."""

from prunekit.graph.groups import CoupledGroup, CouplingGraph, Member, trace
from prunekit.graph.operators import Call, Value, operator_rule

__all__ = ["Call", "CoupledGroup", "CouplingGraph", "Member", "Value", "operator_rule", "trace"]
