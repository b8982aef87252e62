"""What a recovery leaves for the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.recovery.settings import Recovery

_CURVE_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class TrainingPoint:
    """One step of the training; None where a figure was not measured at that step.

    Attributes:
        step: optimizer steps so far.
        tokens: tokens predicted so far.
        loss: mean over the tokens of the step's batch.
        learning_rate: that the next step uses.
        validation_loss: mean over the tokens held out.
        perplexity: "validation", or the name of a watched corpus → perplexity.
    """

    step: int
    tokens: int
    loss: float | None = None
    learning_rate: float | None = None
    validation_loss: float | None = None
    perplexity: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures that were measured."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RecoveryResult:
    """How a recovery went.

    Attributes:
        curve: every step that was evaluated, and of the others at most about 200.
        steps: optimizer steps that were done.
        stopped_early: whether patience ended the training.
        best_step: the step whose state the model has now.
        trainable_parameters: how many numbers were trained.
        examples: how many the model was trained on.
        tokens: how many were predicted.
        seconds: that all of it took.
        recovery: the settings.
        seed: of the order, the adapters' start and dropout.
        micro_batch: rows of one forward pass.
        bf16: whether forward passes computed in bfloat16.
    """

    curve: tuple[TrainingPoint, ...]
    steps: int
    stopped_early: bool
    best_step: int
    trainable_parameters: int
    examples: int
    tokens: int
    seconds: float
    recovery: Recovery
    seed: int
    micro_batch: int
    bf16: bool

    def to_json(self) -> dict[str, Any]:
        """The report's `recovery`."""
        used = {"seed": self.seed, "micro_batch": self.micro_batch, "bf16": self.bf16}
        return {
            "curve": [point.to_json() for point in self.curve],
            "steps": self.steps,
            "stopped_early": self.stopped_early,
            "best_step": self.best_step,
            "trainable_parameters": self.trainable_parameters,
            "examples": self.examples,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "settings": dataclasses.asdict(self.recovery) | used,
        }


def trace_curve(history: Sequence[Mapping[str, Any]], steps: int) -> tuple[TrainingPoint, ...]:
    """The curve of a training of `steps` steps from transformers' log history."""
    figures: dict[int, dict[str, Any]] = {}
    known = [field.name for field in dataclasses.fields(TrainingPoint)]
    for entry in history:
        if "loss" in entry or "perplexity" in entry:
            own = figures.setdefault(entry["step"], {})
            own.update({key: entry[key] for key in known if key in entry})
    points = [TrainingPoint(**own) for _, own in sorted(figures.items())]
    every = max(steps // _CURVE_POINTS, 1)
    kept = (point for point in points if point.step % every == 0 or point.perplexity is not None)
    return tuple(kept)
