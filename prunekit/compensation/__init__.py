"""Compensations: how the weights that stay in a consumer make up for those that leave."""

from prunekit.compensation.base import Compensation, Target
from prunekit.compensation.bias import Bias
from prunekit.compensation.obs import Obs

__all__ = ["Bias", "Compensation", "Obs", "Target"]
