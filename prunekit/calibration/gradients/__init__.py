"""Gradients of the calibration loss.

They are seen one matrix at a time, and let go of as soon as they are reduced to scores.
"""

from prunekit.calibration.gradients.loss import Loss, mean_loss
from prunekit.calibration.gradients.passes import FISHER, MEAN, GradientMoments
from prunekit.calibration.gradients.scores import score_positions
from prunekit.calibration.gradients.state import recomputing
from prunekit.calibration.gradients.taps import tap

__all__ = [
    "FISHER",
    "MEAN",
    "Loss",
    "GradientMoments",
    "recomputing",
    "mean_loss",
    "score_positions",
    "tap",
]
