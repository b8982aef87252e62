"""What happens to the weights that stay in a consumer when others leave."""

from prunekit.compensation.base import Compensation, Target
from prunekit.compensation.bias import Bias
from prunekit.compensation.obs import Obs

__all__ = ["Bias", "Compensation", "Obs", "Target"]
