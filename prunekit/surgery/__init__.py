"""Cut a model by a plan, let attributes follow, and check it against the masked model."""

from prunekit.surgery.apply import apply_plan, apply_to_layer
from prunekit.surgery.cut import cut_layer
from prunekit.surgery.masking import masked

__all__ = ["apply_plan", "apply_to_layer", "cut_layer", "masked"]
