"""Gradients of the calibration loss, seen one matrix at a time and dropped as soon as they are reduced to scores."""

from prunekit.importance.gradients.loss import Loss, mean_loss
from prunekit.importance.gradients.scores import FISHER, MEAN, Moments, position_scores
from prunekit.importance.gradients.state import checkpointed, undisturbed
from prunekit.importance.gradients.taps import is_stock, is_transposed, tap

__all__ = [
    "FISHER",
    "MEAN",
    "Loss",
    "Moments",
    "checkpointed",
    "is_stock",
    "is_transposed",
    "mean_loss",
    "position_scores",
    "tap",
    "undisturbed",
]
