"""One recovery from beginning to end: choose the weights, train with retries, finish."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunekit.errors import DataError
from prunekit.model.updates import Factors, merge
from prunekit.model.weights import check_finite
from prunekit.recovery import adapters
from prunekit.recovery.data import Data
from prunekit.recovery.micro_batch import first_micro_batch, shrink_micro_batch
from prunekit.recovery.result import RecoveryResult, trace_curve
from prunekit.recovery.settings import Recovery
from prunekit.recovery.states import last_checkpoint, load_trained, save_trained
from prunekit.runtime.console import say
from prunekit.runtime.memory import run_within_memory
from prunekit.runtime.numbers import at_least_float32
from prunekit.runtime.torchrun import count_launched, launched_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prunekit.recovery.trainer import RecoveryTrainer, Watch


@dataclass(kw_only=True)
class Session:
    """One recovery of one model: `run` trains it, and `describe` makes the result.

    Attributes:
        model: the pruned model, which is trained in place.
        recovery: the settings.
        data: the rows.
        teacher: the dense model, where the loss compares with it.
        watch: corpus → its perplexity on the model.
        folder: of checkpoints, and of an adapter that is kept.
        seed: of the order of rows, the first adapters, and dropout.
        pad: the token that fills rows.
        updates: name of a weight → U and V, the product of which adapters take out of it.
        trained: the model, or peft's wrapper of it.
        trainable: how many numbers are trained.
    """

    model: PreTrainedModel
    recovery: Recovery
    data: Data
    teacher: PreTrainedModel | None
    watch: Watch
    folder: Path
    seed: int
    pad: int
    updates: Mapping[str, Factors] = field(default_factory=dict)
    trained: nn.Module = field(init=False)
    trainable: int = field(init=False, default=0)
    _taken_out: dict[str, Factors] = field(init=False, default_factory=dict)
    _stored: list[tuple[nn.Parameter, torch.dtype]] = field(init=False, default_factory=list)

    @property
    def checkpoints(self) -> Path:
        """The folder of what an unfinished training goes on from."""
        return self.folder / "checkpoints"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def run(
        self, modules: Mapping[str, Collection[str]] | None, base: str, resume: bool
    ) -> tuple[RecoveryTrainer, int]:
        """Train the model, and make it an ordinary one again unless its adapters are kept.

        After an error no adapter is left; weights that were trained stay as they are.

        Args:
            modules: "mlp" and "attention" → names of their linears.
            base: what the adapters' config names as the model below them.
            resume: go on from the newest checkpoint, if there is one.

        Returns:
            The trainer after the training, and the step whose state the model has.

        Raises:
            DataError: a loss or a weight that is not finite, memory that does not suffice.
        """
        try:
            self._choose_weights(modules, base)
            trainer = self._train(resume)
            best_step = self._settle(trainer)
            self._check_weights(self.trained)
        except BaseException:
            adapters.detach(self.model)
            merge(self.model, self._taken_out)
            self._restore_types()
            raise
        self._finish()
        return trainer, best_step

    def _choose_weights(self, modules: Mapping[str, Collection[str]] | None, base: str) -> None:
        """Decide which weights are trained: adapters, or weights of the model.

        Adapters are fresh ones, but where they go on from what weights hold.
        """
        from transformers import set_seed

        set_seed(self.seed)
        if not self._computes_in_half():
            self._widen()
        recovery = self.recovery
        names = adapters.target_names(self.model, recovery.kinds, modules)
        if recovery.lora:
            weights = {f"{name}.weight" for name in names}
            going_on = {name: own for name, own in self.updates.items() if name in weights}
            merge(self.model, {name: (-up, down) for name, (up, down) in going_on.items()})
            self._taken_out = going_on
            self.trained = adapters.attach(self.model, names, recovery, base)
            adapters.go_on(self.trained, going_on)
        else:
            self.trained = self.model
            chosen = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_("all" in recovery.kinds or name in chosen)
        trainable = (p for p in self.trained.parameters() if p.requires_grad)
        self.trainable = sum(parameter.numel() for parameter in trainable)

    def _computes_in_half(self) -> bool:
        """Whether half-precision weights stay: they are frozen and a GPU computes in bfloat16."""
        from prunekit.recovery.trainer import uses_bfloat16

        on_gpu = self.device.type == "cuda"
        return self.recovery.lora and on_gpu and uses_bfloat16(self.recovery, self.device)

    def _widen(self) -> None:
        """Train half-precision weights in float32; `_restore_types` rounds them back."""
        for parameter in self.model.parameters():
            self._stored.append((parameter, parameter.dtype))
            parameter.data = at_least_float32(parameter.data)

    def _train(self, resume: bool) -> RecoveryTrainer:
        """Train to the end; where memory runs out begin again, with a smaller micro-batch."""
        checkpoint = last_checkpoint(self.checkpoints) if resume else None
        micro = first_micro_batch(self.recovery)
        start = self.folder / "start.safetensors"
        if launched_rank() == 0:
            if checkpoint is None:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            save_trained(self.trained, start)

        def attempt(micro: int) -> RecoveryTrainer:
            trainer = self._make_trainer(micro, fresh=checkpoint is None)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            return trainer

        def begin_again(before: int, micro: int) -> None:
            say(f"recovery: out of memory with micro_batch={before}: once more with {micro}")
            load_trained(self.trained, start)
            self.trained.zero_grad()

        def shrink(micro: int, error: Exception) -> int:
            return shrink_micro_batch(self.recovery, micro, error)

        try:
            return run_within_memory(attempt, micro, shrink, begin_again)
        finally:
            if launched_rank() == 0:
                start.unlink(missing_ok=True)

    def _make_trainer(self, micro: int, *, fresh: bool) -> RecoveryTrainer:
        """A trainer that has done nothing yet."""
        from prunekit.recovery.trainer import RecoveryTrainer, make_arguments

        arguments = make_arguments(
            self.recovery,
            self.checkpoints,
            self.device,
            micro_batch=micro,
            accumulation=self.recovery.batch_size // (micro * count_launched()),
            seed=self.seed,
            fresh=fresh,
        )
        return RecoveryTrainer(
            model=self.trained,
            args=arguments,
            rows=self.data.training,
            validation=self.data.validation,
            pad=self.pad,
            recovery=self.recovery,
            teacher=self.teacher,
            watch=self.watch,
            watched=self.model,
        )

    def _settle(self, trainer: RecoveryTrainer) -> int:
        """Go back to the best state where patience is set; return the step of the state."""
        if self.recovery.patience is None:
            return trainer.state.global_step
        trainer.accelerator.wait_for_everyone()
        load_trained(self.trained, trainer.best_path)
        trainer.accelerator.wait_for_everyone()
        best: Any = trainer.state.best_global_step
        return best

    def _check_weights(self, model: nn.Module) -> None:
        """Raise DataError where a weight is not finite: no loss was seen after the last step."""
        try:
            check_finite(model)
        except DataError as error:
            raise DataError(
                f"recovery: it has diverged: {error}; a smaller recovery.learning_rate than "
                f"{self.recovery.learning_rate:g} may help"
            ) from error

    def _finish(self) -> None:
        """Fold the adapters into the weights, or write them; drop the checkpoints."""
        if self.recovery.lora and self.recovery.merge:
            adapters.merge(self.model)
        self._restore_types()
        if self._stored:  # what is finite in float32 may not be so in half precision
            self._check_weights(self.model)
        if launched_rank() == 0:
            if not self.recovery.merge:
                adapters.save(self.trained, self.folder / "adapter")
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _restore_types(self) -> None:
        """Give every parameter the type that it was stored in."""
        for parameter, stored in self._stored:
            parameter.data = parameter.data.to(stored)

    def describe(self, trainer: RecoveryTrainer, best_step: int, seconds: float) -> RecoveryResult:
        """The result, from the trainer and the step that `run` returned, and the seconds in all."""
        state, arguments = trainer.state, trainer.args
        return RecoveryResult(
            curve=trace_curve(state.log_history, state.max_steps),
            steps=state.global_step,
            stopped_early=state.global_step < state.max_steps,
            best_step=best_step,
            trainable_parameters=self.trainable,
            examples=self.data.examples,
            tokens=int(state.num_input_tokens_seen),
            seconds=seconds,
            recovery=self.recovery,
            seed=self.seed,
            micro_batch=arguments.per_device_train_batch_size,
            bf16=arguments.bf16,
        )
