"""What a forward pass costs as a function of the units removed: floating point operations counted,
seconds measured.
"""

from prunekit.allocation.costs.flops import flops_cost
from prunekit.allocation.costs.latency import latency_cost

__all__ = ["flops_cost", "latency_cost"]
