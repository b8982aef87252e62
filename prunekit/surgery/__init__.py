"""Cut a model by a plan, let attributes follow, and check it against the masked model."""

from prunekit.surgery.apply import apply_plan
from prunekit.surgery.attempts import cut_until_right
from prunekit.surgery.check import compare_outputs
from prunekit.surgery.cut import cut_layer
from prunekit.surgery.masking import masked

__all__ = ["apply_plan", "compare_outputs", "cut_layer", "cut_until_right", "masked"]
