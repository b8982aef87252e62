"""The base of importances that learn gates, under the budget of the run where there is one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.gates import Bounds, Layout, Rule, Training, halve, learn
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import Measured, ScoreImportance


@dataclass(frozen=True, kw_only=True)
class LearnedImportance(ScoreImportance):
    """Scores units by gates that are trained; backends implement `make_rule`.

    Where scores are asked for and no budget is known (`policy=sensitivity`, `policy=search`), gates
    are trained for half of each group's units.

    Args:
        train: how gates are trained.
        sublayers: have one more gate for each group that can lose all of its units.
    """

    train: Training = field(default_factory=Training)
    sublayers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.train, Training):
            raise ConfigError(
                f"importance.train: expected a prunekit.gates.Training, got {self.train!r}"
            )
        if not isinstance(self.sublayers, bool):
            raise ConfigError(
                f"importance.sublayers: expected true or false, got {self.sublayers!r}"
            )

    @property
    def comparable(self) -> bool:
        """True: gates learn what a unit is worth for its price."""
        return True

    @property
    def changes_weights(self) -> bool:
        """Whether weights are trained beside the gates."""
        return self.train.rank > 0 or self.train.all_weights

    @property
    def kept_rank(self) -> int:
        """The rank of updates that a recovery goes on with."""
        return 0 if self.train.merge else self.train.rank

    @property
    def rescores(self) -> bool:
        """False: the gates of all groups are trained together."""
        return False

    @abstractmethod
    def make_rule(self, layout: Layout, bounds: Bounds, first: Tensor) -> Rule:
        """What a gate is: see `prunekit.gates.Rule`."""

    def measure(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
        bounds: Bounds | None,
    ) -> Measured:
        """Train the gates of these groups within bounds; the model is left as it was."""
        learned = learn(
            model, graph, groups, batches, bounds or halve(groups), self.make_rule, self.train
        )
        structures = {name: scores[None] for name, scores in learned.scores.items()}
        return Measured(structures=structures, scales=learned.scales, updates=learned.updates)

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One structure a group: a unit has one gate."""
        return dict(self.measure(model, graph, groups, batches, None).structures)
