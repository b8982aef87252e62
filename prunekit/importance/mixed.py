"""Mixed: the weighted mean of several importances' ranks, or of their normalised scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import isabstract
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunekit.calibration.weighting import EQUAL, Outputs, Weighting
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError, expect_one_of
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.aggregation import normalise
from prunekit.importance.base import ScoreImportance, Sight, spell

By = Literal["rank", "score"]


@dataclass(frozen=True, kw_only=True)
class Mixed(ScoreImportance):
    """Units by several importances at once.

    Args:
        parts: the names of importances that score units.
        weights: how much each of them counts, numbers ≥ 0.
        options: name of a part → its options that are not at their defaults.
        by: rank: a unit's place in the order of its group, in [0, 1); score: its score over the
            mean of its group.

    Raises:
        ConfigError: an unknown part, options that it hasn't, or weights that don't fit the parts.
    """

    parts: Sequence[str] = ("obs", "peak_to_peak")
    weights: Sequence[float] = (1.0, 1.0)
    by: By = "rank"
    options: Mapping[str, Mapping[str, Any]] | None = None

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
        for part, own in (self.options or {}).items():
            expect_one_of("importance.options", part, list(self.parts))
            for key in own:
                known_keys = [option.name for option in fields(_known()[part])]
                expect_one_of(f"importance.options.{part}", key, known_keys)
        self._build()

    def _build(self) -> list[ScoreImportance]:
        """The importances that the parts name."""
        return [_known()[part](**(self.options or {}).get(part, {})) for part in self.parts]

    @property
    def weighting(self) -> Weighting:
        """That of the first part which weighs tokens."""
        return next((p.weighting for p in self._build() if p.weighting != EQUAL), EQUAL)

    @property
    def output_weights(self) -> Outputs:
        """That of the first part which weighs outputs."""
        weights = [part.output_weights for part in self._build()]
        return next((own for own in weights if own != "equal"), "equal")

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One row a group: the mean over the parts."""
        parts = [part.score(model, graph, groups, batches) for part in self._build()]
        return {g.name: self._mix([scores[g.name] for scores in parts])[None] for g in groups}

    def rescore(self, sight: Sight) -> Tensor:
        """The mean over the parts, each of which scores the model as it is now."""
        return self._mix([part.rescore(sight) for part in self._build()])

    def _mix(self, parts: Sequence[Tensor]) -> Tensor:
        """The weighted mean of the parts' scores [num_units] of a group, made comparable."""
        total = torch.zeros_like(parts[0], dtype=torch.float64)
        for scores, weight in zip(parts, self.weights, strict=True):
            total += weight / sum(self.weights) * self._comparable(scores)
        return total

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
