"""The base of every importance: by what the units of a group are told apart that matter least.

Units are scored structure by structure: a structure W_i of a group (LLM-Pruner, section 3.2) is the
slice of one matrix along one of its dims, with the bias of its module. The score of a unit
aggregates the scores of the structures it has a part in.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from torch import Tensor, nn

from prunekit.calibration.activations import InputSums
from prunekit.calibration.weighting import EQUAL, Outputs, Weighting
from prunekit.data.batches import Batch
from prunekit.errors import expect_one_of
from prunekit.gates.bounds import Bounds
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.aggregation import Aggregation, Normalisation, aggregate, normalise
from prunekit.obs.inverse import Problem


class Importance(ABC):  # noqa: B024 - each of its two kinds below has an abstract method
    """A way of telling which units matter least.

    There are two ways, and an importance takes one of them or both:

    - a `ScoreImportance` scores all units at once, on the model as it is (`structures`);
    - a `LayerImportance` chooses the units of one group at a time, from the second moments of what
      its consumers are fed once the layers before it are cut (`choose`).

    Who needs one of the two asks `at_once` or `by_layer` for it.
    """

    @property
    def name(self) -> str:
        """What messages call it: the name of its class in snake case."""
        return spell(type(self))

    @property
    def at_once(self) -> ScoreImportance | None:
        """This importance, if it can score all units at once."""
        return self if isinstance(self, ScoreImportance) else None

    @property
    def by_layer(self) -> LayerImportance | None:
        """This importance, if it can choose the units of one group at a time."""
        return self if isinstance(self, LayerImportance) else None

    @property
    def weighting(self) -> Weighting:
        """How tokens are weighed in the moments that units are chosen by: all alike."""
        return EQUAL

    @property
    def output_weights(self) -> Outputs:
        """How errors in the outputs are weighed where units are chosen: all alike."""
        return "equal"

    @property
    def comparable(self) -> bool:
        """Whether scores of different groups compare as they are, instead of per unit of cost."""
        return self.at_once is not None and self.at_once.normalisation != "none"


def spell(kind: type) -> str:
    """The name of a class in snake case, as in the configuration."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an importance found.

    Attributes:
        structures: group name → float64 [structures, num_units], as `ScoreImportance.structures`.
        scales: group name → float64 [num_units]: what the consumers of a unit that stays are to be
            multiplied by; empty where they stay as they are.
        updates: name of a weight → what is to be added to it: U [out, r] and V [r, in], of which
            it is the product, or itself.
    """

    structures: Mapping[str, Tensor]
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    updates: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What is known of a group in a layer-wise run, once the groups before it are cut.

    Attributes:
        model: as it is now; the columns of units that are gone are zero.
        graph: its coupling graph.
        group: the group that is about to be cut.
        batches: the calibration set.
        inputs: name of a consumer's weight → statistics of what it is fed now.
        problems: for each site that reads the group: W and A = (H + λI)⁻¹ of its inputs.
    """

    model: nn.Module
    graph: CouplingGraph
    group: Group
    batches: Sequence[Batch]
    inputs: Mapping[str, InputSums]
    problems: Sequence[Problem]


@dataclass(frozen=True, kw_only=True)
class ScoreImportance(Importance, ABC):
    """Scores every unit on the model as it is; low scores go first.

    Backends implement `structures`.

    Args:
        aggregation: of the scores of a group's structures: sum, mean, max, prod, first or last (in
            execution order).
        normalisation: of the scores of each group: none, mean (over their mean), parameters (over
            the parameters that go with one unit).
    """

    aggregation: Aggregation = "sum"
    normalisation: Normalisation = "none"

    def __post_init__(self) -> None:
        expect_one_of("importance.aggregation", self.aggregation, get_args(Aggregation))
        expect_one_of("importance.normalisation", self.normalisation, get_args(Normalisation))

    @property
    def changes_weights(self) -> bool:
        """Whether `measure` may ask for updates of weights."""
        return False

    @property
    def kept_rank(self) -> int:
        """The rank of updates that stay beside the weights for a recovery; 0: none stay."""
        return 0

    @property
    def rescores(self) -> bool:
        """Whether the units of one group can be scored alone, while the others are being cut."""
        return True

    def expect_groups(self, graph: CouplingGraph, groups: Sequence[Group]) -> None:
        """Check, before any work, that these groups can be scored: most importances score any.

        Raises:
            ConfigError: one can't.
        """

    @abstractmethod
    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """Score the structures of each group; the model is left as it was.

        Returns:
            Group name → float64 [structures ≥ 1, num_units] on the CPU, in execution order; scores
            are ≥ 0 where there are several structures.
        """

    def measure(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
        bounds: Bounds | None,
    ) -> Measured:
        """As `structures`, for a choice within bounds, which most importances don't look at."""
        return Measured(structures=self.structures(model, graph, groups, batches))

    def score(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """Group name → the scores of its units, float64 [num_units]."""
        structures = self.structures(model, graph, groups, batches)
        return {group.name: self.combine(group, structures[group.name]) for group in groups}

    def rescore(self, sight: Sight) -> Tensor:
        """The scores of a group's units [num_units] as the model is now, float64 on the CPU.

        Unless a backend knows them from what a layer-wise run has measured, they take passes over
        the calibration set.
        """
        return self.score(sight.model, sight.graph, [sight.group], sight.batches)[sight.group.name]

    def combine(self, group: Group, structures: Tensor) -> Tensor:
        """Scores of structures [structures, num_units] → scores of units [num_units], a new one."""
        combined = aggregate(structures, self.aggregation).clone()
        return normalise(combined, self.normalisation, group.parameters_per_unit)


class LayerImportance(Importance, ABC):
    """Chooses units layer by layer, on the inputs that the already cut layers give.

    Backends implement `choose`.

    Attributes:
        nested: the units of a lower count are always the first ones of a higher count, so that one
            choice serves both.
    """

    @property
    def nested(self) -> bool:
        """Whether `choose` takes units one after another, each for good."""
        return False

    @abstractmethod
    def choose(self, problems: Sequence[Problem], count: int) -> list[int]:
        """Choose `count` units of one group, given a problem for each site that reads them.

        A problem holds the consumers' W [d, n], A = (H + λI)⁻¹ [n, n] of their inputs, and the
        columns that each unit owns, int64 [num_units, width].
        """

    def choose_levels(self, problems: Sequence[Problem], counts: Sequence[int]) -> list[list[int]]:
        """The units that go at each of these rising counts."""
        if not self.nested:
            return [self.choose(problems, count) for count in counts]
        order = self.choose(problems, counts[-1])
        return [order[:count] for count in counts]
