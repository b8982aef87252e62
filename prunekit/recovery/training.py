"""Recovery from end to end: rows, adapters, the training with its retries, the merge, the report."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.errors import ConfigError, DataError, suggest
from prunekit.model.inputs import check_length
from prunekit.recovery import adapters
from prunekit.recovery.data import Data, collate, load_data, pad_token
from prunekit.recovery.result import RecoveryResult, trace_curve
from prunekit.recovery.settings import VALIDATION, Recovery
from prunekit.runtime.console import say
from prunekit.runtime.memory import run_within_memory
from prunekit.runtime.modes import evaluating

_LARGEST_MICRO_BATCH = 16


def recover(
    model: Any,
    tokenizer: Any,
    recovery: Recovery,
    *,
    known: Mapping[str, Any],
    seed: int,
    folder: Path,
    teacher: nn.Module | None = None,
    watch: Mapping[str, Callable[[nn.Module], float]] | None = None,
    modules: Mapping[str, Collection[str]] | None = None,
    resume: bool = False,
    base: str | None = None,
    data: Data | None = None,
) -> RecoveryResult:
    """Fine-tune a causal language model in place, on the device where its weights are.

    With `recovery.merge` the model is an ordinary one again: the same parameters, no adapter left.
    Without, it computes with its adapters until `prunekit.recovery.detach(model)` takes them off,
    and `folder/adapter` holds them for `peft.PeftModel.from_pretrained(pruned_model, folder /
    "adapter")`. Where `recovery.patience` is set the state with the lowest `stop_on` perplexity
    stays (the start included), else the last.

    Under torchrun every process calls this with the same arguments; the first one writes.

    Args:
        model: the pruned model; float32 or half precision, any layer widths.
        tokenizer: its tokenizer.
        recovery: what to do.
        known: the configuration's `corpora`.
        seed: used where `recovery.seed` is None.
        folder: checkpoints live in `folder/checkpoints` while it runs; those of a run that was cut
            short are what `resume` goes on from, and they are read with `weights_only`.
        teacher: the dense model, for distillation; moved to the model's device.
        watch: corpus → its held-out perplexity now; called on the model in evaluation mode, by
            every process.
        modules: "mlp" and "attention" → names of their linears, for
            `recovery.targets`.
        resume: go on from the newest checkpoint, if there is one.
        base: what the adapter's config names as the model below it; `folder/model` where None.
        data: what `prepare` gave, if it was called before.

    Returns:
        How the training went, for the report.

    Raises:
        ConfigError: settings that don't fit the model or each other.
        DataError: a corpus that can't be used, a loss that is not finite, memory that does not
            suffice.
    """
    watch = watch or {}
    if recovery.needs_teacher and teacher is None:
        raise ConfigError(
            "recovery.kl and recovery.hidden: expected a teacher, the dense model, got none"
        )
    began = time.perf_counter()
    data = data or prepare(model, tokenizer, recovery, known=known, seed=seed, watch=watch)
    seed = seed if recovery.seed is None else recovery.seed
    if recovery.pack:
        with evaluating(model):
            check_packing(model, data, pad_token(tokenizer))
    with adapters.unchanged(model):
        run = _Run(
            recovery,
            data,
            teacher if recovery.needs_teacher else None,
            watch,
            folder,
            seed,
            pad_token(tokenizer),
        )
        try:
            run.prepare(model, modules, base or str(folder / "model"))
            trainer = run.train(resume)
            best = run.settle(trainer)
        except BaseException:
            adapters.detach(model)
            run.restore_types()
            raise
        run.finish()
    if _rank() == 0:
        shutil.rmtree(run.checkpoints, ignore_errors=True)
    return _result(trainer, run, best, time.perf_counter() - began)


class _Run:
    """One recovery while it lasts."""

    def __init__(
        self,
        recovery: Recovery,
        data: Data,
        teacher: nn.Module | None,
        watch: Any,
        folder: Path,
        seed: int,
        pad: int,
    ) -> None:
        self.recovery, self.data, self.teacher, self.watch = recovery, data, teacher, watch
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        self.seed, self.pad = seed, pad
        self.types: list[tuple[nn.Parameter, torch.dtype]] = []

    def prepare(self, model: Any, modules: Any, base: str) -> None:
        """Decide what is trained: fresh adapters, or the weights themselves.

        Half-precision weights wait in float32 meanwhile, unless they are frozen and a GPU computes
        in bfloat16.
        """
        from transformers import set_seed

        from prunekit.recovery.trainer import mixed_precision

        set_seed(self.seed)
        device = next(model.parameters()).device
        if not (
            self.recovery.lora and device.type == "cuda" and mixed_precision(self.recovery, device)
        ):
            self.types = [(p, p.dtype) for p in model.parameters()]
            for parameter in model.parameters():
                parameter.data = parameter.data.to(
                    torch.promote_types(parameter.dtype, torch.float32)
                )
        self.model = self.trained = model
        recovery = self.recovery
        names = adapters.target_names(model, recovery.kinds, modules)
        if recovery.lora:
            self.trained = adapters.attach(model, names, recovery, base)
        else:
            chosen = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("all" in recovery.kinds or name in chosen)
        self.trainable = sum(p.numel() for p in self.trained.parameters() if p.requires_grad)

    def train(self, resume: bool) -> Any:
        """Train to the end, with half the micro-batch whenever memory runs out
        (`micro_batch=auto`).
        """
        from prunekit.recovery import trainer as own

        checkpoint = own.last_checkpoint(self.checkpoints) if resume else None
        micro = self.first_micro_batch()
        if _rank() == 0:
            if checkpoint is None:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            own.save_trained(self.trained, start := self.folder / "start.safetensors")

        def attempt(micro: int) -> Any:
            trainer = self.trainer(micro, checkpoint is None)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            return trainer

        def begin_again(before: int, micro: int) -> None:
            say(f"recovery: out of memory with micro_batch={before}: once more with {micro}")
            own.load_trained(self.trained, start)
            self.trained.zero_grad()

        try:
            return run_within_memory(attempt, micro, self.smaller, begin_again)
        finally:
            if _rank() == 0:
                start.unlink(missing_ok=True)

    def trainer(self, micro: int, fresh: bool) -> Any:
        """A trainer that has done nothing yet."""
        from prunekit.recovery.trainer import RecoveryTrainer, arguments

        steps = self.recovery.batch_size // (micro * _processes())
        device = next(self.model.parameters()).device
        return RecoveryTrainer(
            model=self.trained,
            args=arguments(self.recovery, self.checkpoints, device, micro, steps, self.seed, fresh),
            rows=self.data.training,
            validation=self.data.validation,
            pad=self.pad,
            recovery=self.recovery,
            teacher=self.teacher,
            watch=self.watch,
            watched=self.model,
        )

    def first_micro_batch(self) -> int:
        """The configured one, or the largest that divides a process's part and is not above 16."""
        own, rest = divmod(self.recovery.batch_size, _processes())
        fixed = self.recovery.micro_batch
        if rest or (fixed != "auto" and own % fixed):
            of = "" if fixed == "auto" else f" × recovery.micro_batch={fixed}"
            raise ConfigError(
                f"recovery.batch_size: expected a multiple of {_processes()} processes{of}, "
                f"got {self.recovery.batch_size}"
            )
        return _divisor(own, _LARGEST_MICRO_BATCH) if fixed == "auto" else fixed

    def smaller(self, micro: int, error: Exception) -> int:
        """Half the micro-batch, or DataError where it is fixed or one row is too much."""
        if micro == 1:
            raise DataError(
                "recovery: out of memory with one row; recovery.length, half as long, halves it"
            ) from error
        half = _divisor(micro, micro // 2)
        if self.recovery.micro_batch == "auto" and _processes() == 1:
            return half
        raise DataError(
            f"recovery: out of memory with micro_batch={micro}; recovery.micro_batch={half} halves it"
        ) from error

    def settle(self, trainer: Any) -> int:
        """Go back to the best state where patience is set; which step it is from."""
        from prunekit.recovery.trainer import BEST, load_trained

        history = [entry for entry in trainer.state.log_history if "perplexity" in entry]
        if self.recovery.patience is None or not history:
            return trainer.state.global_step
        best = min(history, key=lambda entry: entry["perplexity"][self.recovery.stop_on])
        trainer.accelerator.wait_for_everyone()
        load_trained(self.trained, self.checkpoints / BEST)
        trainer.accelerator.wait_for_everyone()
        return best["step"]

    def finish(self) -> None:
        """Fold what was trained into the weights, or keep it as an adapter."""
        if self.recovery.lora and self.recovery.merge:
            adapters.merge(self.model)
        self.restore_types()
        if not self.recovery.merge and _rank() == 0:
            adapters.save(self.trained, self.folder / "adapter")

    def restore_types(self) -> None:
        """Every parameter in the type it was stored in."""
        for parameter, stored in self.types:
            parameter.data = parameter.data.to(stored)


@torch.no_grad()
def check_packing(model: Any, data: Data, pad: int) -> None:
    """Raise ConfigError where the model lets an example see its neighbours in the row."""
    rows = [row for row in data.training if len(row) > 1][:2]
    device = next(model.parameters()).device
    for i, row in enumerate(rows):
        batch = {
            key: value.to(device)
            for key, value in collate(rows, pad, True).items()
            if key != "labels"
        }
        first, second = len(row[0].ids), len(row[1].ids)
        together = model(**batch, use_cache=False).logits[i, first : first + second].float()
        alone = (
            model(input_ids=row[1].ids.long()[None].to(device), use_cache=False).logits[0].float()
        )
        tolerance = (
            1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 5e-2
        )
        if (together - alone).norm() > tolerance * alone.norm():
            raise ConfigError(
                "recovery.pack: this model lets examples in a row see each other; use recovery.pack=false"
            )


def prepare(
    model: nn.Module,
    tokenizer: Any,
    recovery: Recovery,
    *,
    known: Mapping[str, Any],
    seed: int,
    watch: Collection[str],
) -> Data:
    """The rows to train on, loaded before anything long begins; arguments and errors as of
    `recover`.
    """
    if recovery.patience is not None and recovery.stop_on not in (names := [VALIDATION, *watch]):
        raise ConfigError(
            f"recovery.stop_on: unknown name {recovery.stop_on!r}: {suggest(recovery.stop_on, names)}"
        )
    check_length("recovery.length", recovery.length, model)
    return load_data(recovery, tokenizer, known, seed if recovery.seed is None else recovery.seed)


def _result(trainer: Any, run: _Run, best: int, seconds: float) -> RecoveryResult:
    state = trainer.state
    return RecoveryResult(
        curve=trace_curve(state.log_history, state.max_steps),
        steps=state.global_step,
        stopped_early=state.global_step < state.max_steps,
        best_step=best,
        trainable_parameters=run.trainable,
        examples=run.data.examples,
        tokens=state.num_input_tokens_seen,
        seconds=seconds,
        recovery=run.recovery,
        seed=run.seed,
        micro_batch=trainer.args.per_device_train_batch_size,
        bf16=trainer.args.bf16,
    )


def _divisor(number: int, most: int) -> int:
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
