"""From shares to whole units: what a cut may touch, what it saves, and the budget that it must meet
exactly.
"""

from prunekit.allocation.budget import Budget, lowest
from prunekit.allocation.costs.base import Cost, Term, weights_cost
from prunekit.allocation.scope import Scope

__all__ = ["Budget", "Cost", "Scope", "Term", "lowest", "weights_cost"]
