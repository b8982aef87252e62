"""Cut a model by a plan, let attributes follow, and check it against the masked model."""

from prunekit.surgery.apply import apply_plan
from prunekit.surgery.attempts import cut_and_check
from prunekit.surgery.cut import cut_layer
from prunekit.surgery.masking import masked

__all__ = ["apply_plan", "cut_and_check", "cut_layer", "masked"]
