"""Importances: which units matter least. One backend a file; `base` says what one is."""

from prunekit.importance.ablation import Ablation
from prunekit.importance.alternate import Alternate
from prunekit.importance.base import Importance, LayerImportance, ScoreImportance
from prunekit.importance.fluctuation import Fluctuation
from prunekit.importance.hard_concrete import HardConcrete
from prunekit.importance.learned import LearnedImportance
from prunekit.importance.lora import LoraGradient
from prunekit.importance.magnitude import Magnitude
from prunekit.importance.mixed import Mixed
from prunekit.importance.obs import Obs
from prunekit.importance.peak_to_peak import PeakToPeak
from prunekit.importance.random import Random
from prunekit.importance.reap import Reap
from prunekit.importance.similarity import Similarity
from prunekit.importance.straight_through import StraightThrough
from prunekit.importance.taylor import TaylorFirst, TaylorMixed, TaylorSecond, TaylorVector
from prunekit.importance.wanda import Wanda

__all__ = [
    "Ablation",
    "Alternate",
    "Fluctuation",
    "HardConcrete",
    "Importance",
    "LayerImportance",
    "LearnedImportance",
    "LoraGradient",
    "Magnitude",
    "Mixed",
    "Obs",
    "PeakToPeak",
    "Random",
    "Reap",
    "ScoreImportance",
    "Similarity",
    "StraightThrough",
    "TaylorFirst",
    "TaylorMixed",
    "TaylorSecond",
    "TaylorVector",
    "Wanda",
]
