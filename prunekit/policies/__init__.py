"""How much to cut where: policies give a shape over the layers, the budget solver scales it to the target."""

from prunekit.policies.base import Policy
from prunekit.policies.budget import allocate
from prunekit.policies.manual import Manual
from prunekit.policies.ramp import LinearDecrease, LinearIncrease, LogDecrease, LogIncrease
from prunekit.policies.uniform import Uniform
from prunekit.policies.window import Window

__all__ = [
    "LinearDecrease",
    "LinearIncrease",
    "LogDecrease",
    "LogIncrease",
    "Manual",
    "Policy",
    "Uniform",
    "Window",
    "allocate",
]
