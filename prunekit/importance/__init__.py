"""What matters least: a score per unit of a coupled group."""

from prunekit.importance.base import Importance, LayerImportance, ScoreImportance
from prunekit.importance.fluctuation import Fluctuation
from prunekit.importance.layers import Ablation, Alternate, Similarity
from prunekit.importance.lora import LoraGradient
from prunekit.importance.magnitude import Magnitude
from prunekit.importance.obs import Obs
from prunekit.importance.random import Random
from prunekit.importance.taylor import TaylorFirst, TaylorMixed, TaylorSecond, TaylorVector
from prunekit.importance.wanda import Wanda

__all__ = [
    "Ablation",
    "Alternate",
    "Fluctuation",
    "Importance",
    "LayerImportance",
    "LoraGradient",
    "Magnitude",
    "Obs",
    "Random",
    "ScoreImportance",
    "Similarity",
    "TaylorFirst",
    "TaylorMixed",
    "TaylorSecond",
    "TaylorVector",
    "Wanda",
]
