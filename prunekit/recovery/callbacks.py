"""Callbacks of a recovery: evaluations, checkpoints, messages, early stops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from prunekit.errors import DataError
from prunekit.recovery.settings import Recovery
from prunekit.runtime.console import say

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_MESSAGES = 20  # about so many lines of losses in a training


class Patience(EarlyStoppingCallback):
    """transformers' early stopping, without its check of how a training is set up.

    The check expects evaluations and checkpoints at fixed numbers of steps, and transformers to
    load the best one. Here `Monitor` asks for evaluations, and `RecoveryTrainer` keeps the best
    state, of the trained weights alone.
    """

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Check nothing."""


class Monitor(TrainerCallback):
    """Asks for evaluations and checkpoints, prints losses, and ends a training that diverged."""

    def __init__(self, recovery: Recovery) -> None:
        self.recovery = recovery

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for an evaluation and a checkpoint where they are due.

        The evaluations are spread evenly, the last one after the last step.
        """
        step, last = state.global_step, state.max_steps
        count, every = self.recovery.evaluations, self.recovery.checkpoints
        control.should_evaluate = step * count // last > (step - 1) * count // last
        control.should_save = bool(every) and step % every == 0 and step < last

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the tokens so far, and print the losses.

        Raises:
            DataError: a loss that is not finite.
        """
        logs = logs or {}
        history: list[Any] = state.log_history
        history[-1]["tokens"] = state.num_input_tokens_seen
        figures = [logs[key] for key in ("loss", "validation_loss") if key in logs]
        figures += logs.get("perplexity", {}).values()
        if not all(map(math.isfinite, figures)):
            raise DataError(
                f"recovery: the loss at step {state.global_step} is {figures[0]}: its weights or "
                "activations hold NaN or infinity; a smaller recovery.learning_rate than "
                f"{self.recovery.learning_rate:g} may help"
            )
        if state.is_world_process_zero and (line := _describe(state, logs)):
            say(line)


def _describe(state: TrainerState, logs: Mapping[str, Any]) -> str:
    """A line on an evaluation or, about `_MESSAGES` times, on the loss; else an empty text."""
    where = f"recovery: step {state.global_step}/{state.max_steps}"
    if "perplexity" in logs:
        values = (f"{name} {value:.4g}" for name, value in logs["perplexity"].items())
        return f"{where}, perplexity {', '.join(values)}"
    is_due = state.global_step % max(state.max_steps // _MESSAGES, 1) == 0
    return f"{where}, loss {logs['loss']:.4f}" if "loss" in logs and is_due else ""
