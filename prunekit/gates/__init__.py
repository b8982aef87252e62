"""Gates: a learned factor on every unit, which says what may go, and how strongly the rest counts.

`places` puts gates on a model by the coupling graph alone; `training` learns them; a `Rule` says
what a gate is: `straight_through` or `hard_concrete`; `updates` and `adapters`, what is trained
beside them.
"""

from prunekit.gates.bounds import Bounds, Keeper, halve
from prunekit.gates.folding import fold
from prunekit.gates.hard_concrete import HardConcreteRule
from prunekit.gates.layout import Layout
from prunekit.gates.places import find_places, gated
from prunekit.gates.rule import Learned, Rule
from prunekit.gates.straight_through import StraightThroughRule
from prunekit.gates.training import Training, learn
from prunekit.gates.updates import cut_factors
from prunekit.model.updates import Factors, merge, pack, unpack

__all__ = [
    "Bounds",
    "Factors",
    "HardConcreteRule",
    "Keeper",
    "Layout",
    "Learned",
    "Rule",
    "StraightThroughRule",
    "Training",
    "cut_factors",
    "find_places",
    "fold",
    "gated",
    "halve",
    "learn",
    "merge",
    "pack",
    "unpack",
]
