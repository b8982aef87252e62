"""Mixed: the weighted mean of several importances' ranks, or of their normalised scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import isabstract
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prunekit.data.batches import Batch
from prunekit.errors import ConfigError, expect_one_of
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.aggregation import normalise
from prunekit.importance.base import ScoreImportance, spell

By = Literal["rank", "score"]


@dataclass(frozen=True, kw_only=True)
class Mixed(ScoreImportance):
    """Units by several importances at once, each with its default options.

    Args:
        parts: the names of importances that score units.
        weights: how much each of them counts, numbers ≥ 0.
        by: rank: a unit's place in the order of its group, in [0, 1); score: its score over the
            mean of its group.

    Raises:
        ConfigError: an unknown part, or weights that don't fit them.
    """

    parts: Sequence[str] = ("obs", "peak_to_peak")
    weights: Sequence[float] = (1.0, 1.0)
    by: By = "rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_one_of("importance.by", self.by, get_args(By))
        known = sorted(_known())
        listed = isinstance(self.parts, Sequence) and not isinstance(self.parts, str)
        if not listed or not self.parts:
            raise ConfigError(f"importance.parts: expected a list of names, got {self.parts!r}")
        for part in self.parts:
            expect_one_of("importance.parts", part, known)
        numbers = [w for w in self.weights if not isinstance(w, bool | str) and 0 <= w < math.inf]
        if len(numbers) != len(self.parts) or len(self.weights) != len(self.parts):
            raise ConfigError(
                f"importance.weights: expected {len(self.parts)} numbers ≥ 0, one for each of "
                f"importance.parts, got {list(self.weights)}"
            )
        if not any(numbers):
            raise ConfigError("importance.weights: expected one that is not 0, all are")

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One row a group: the mean over the parts."""
        totals = {g.name: torch.zeros(g.num_units, dtype=torch.float64) for g in groups}
        for part, weight in zip(self.parts, self.weights, strict=True):
            scores = _known()[part]().score(model, graph, groups, batches)
            for name, total in totals.items():
                total += weight / sum(self.weights) * self._comparable(scores[name])
        return {name: total[None] for name, total in totals.items()}

    def _comparable(self, scores: Tensor) -> Tensor:
        if self.by == "score":
            return normalise(scores, "mean", 1)
        return scores.argsort(stable=True).argsort().double() / len(scores)


def _known() -> dict[str, type[ScoreImportance]]:
    """The importances that score units, by name; without this one, and without learned ones."""
    from prunekit import importance

    found = {}
    for name in importance.__all__:
        cls = getattr(importance, name)
        scores = isinstance(cls, type) and issubclass(cls, ScoreImportance)
        if scores and not isabstract(cls) and not issubclass(cls, importance.LearnedImportance):
            found[spell(cls)] = cls
    del found["mixed"]
    return found
