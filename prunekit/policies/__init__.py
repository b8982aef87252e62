"""Policies: how much is cut where. One backend a file; `base` says what one is."""

from prunekit.policies.base import DepthPolicy, Policy, Setting
from prunekit.policies.expected_loss import ExpectedLoss
from prunekit.policies.manual import Manual
from prunekit.policies.owl import Owl
from prunekit.policies.ramp import LinearDecrease, LinearIncrease, LogDecrease, LogIncrease
from prunekit.policies.sensitivity import Sensitivity
from prunekit.policies.single import Single
from prunekit.policies.uniform import Uniform
from prunekit.policies.window import Window

__all__ = [
    "DepthPolicy",
    "ExpectedLoss",
    "LinearDecrease",
    "LinearIncrease",
    "LogDecrease",
    "LogIncrease",
    "Manual",
    "Owl",
    "Policy",
    "Sensitivity",
    "Setting",
    "Single",
    "Uniform",
    "Window",
]
