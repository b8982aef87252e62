"""How much to cut where: policies give the groups' shares, the budget turns them into whole units at the target."""

from prunekit.policies.base import DepthPolicy, Policy, Setting
from prunekit.policies.budget import Budget, lowest
from prunekit.policies.cost import Cost, Term, weights_cost
from prunekit.policies.manual import Manual
from prunekit.policies.owl import Owl
from prunekit.policies.ramp import LinearDecrease, LinearIncrease, LogDecrease, LogIncrease
from prunekit.policies.scope import Scope
from prunekit.policies.sensitivity import Sensitivity
from prunekit.policies.single import Single
from prunekit.policies.uniform import Uniform
from prunekit.policies.window import Window

__all__ = [
    "Budget",
    "Cost",
    "DepthPolicy",
    "LinearDecrease",
    "LinearIncrease",
    "LogDecrease",
    "LogIncrease",
    "Manual",
    "Owl",
    "Policy",
    "Scope",
    "Sensitivity",
    "Setting",
    "Single",
    "Term",
    "Uniform",
    "Window",
    "lowest",
    "weights_cost",
]
