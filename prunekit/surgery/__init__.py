"""Cut a model by a plan, bring what repeats its sizes in line, and check the result against the
masked model.
"""

from prunekit.surgery.check import apply_plan
from prunekit.surgery.cut import cut_layer
from prunekit.surgery.masking import masked

__all__ = ["apply_plan", "cut_layer", "masked"]
