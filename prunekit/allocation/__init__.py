"""From shares to whole units: the scope of a cut, its costs, and the budget that it must meet."""

from prunekit.allocation.budget import Budget, pick_lowest
from prunekit.allocation.costs.base import Cost, CostModel, CostSetting, Term
from prunekit.allocation.scope import Scope

__all__ = ["Budget", "Cost", "CostModel", "CostSetting", "Scope", "Term", "pick_lowest"]
