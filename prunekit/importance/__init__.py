"""What matters least: a score per unit of a coupled group."""

from prunekit.importance.base import Importance, LayerImportance, ScoreImportance
from prunekit.importance.lora import LoraGradient
from prunekit.importance.magnitude import Magnitude
from prunekit.importance.obs import Obs
from prunekit.importance.random import Random
from prunekit.importance.taylor import TaylorFirst, TaylorMixed, TaylorSecond, TaylorVector

__all__ = [
    "Importance",
    "LayerImportance",
    "LoraGradient",
    "Magnitude",
    "Obs",
    "Random",
    "ScoreImportance",
    "TaylorFirst",
    "TaylorMixed",
    "TaylorSecond",
    "TaylorVector",
]
