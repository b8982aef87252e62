"""Recovery from end to end: rows, adapters, the training, the merge, the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from prunekit.errors import ConfigError, suggest
from prunekit.model.inputs import check_length
from prunekit.model.updates import Factors
from prunekit.recovery import adapters
from prunekit.recovery.data import Data, load_data, pad_token
from prunekit.recovery.packing import check_packing
from prunekit.recovery.result import RecoveryResult
from prunekit.recovery.session import Session
from prunekit.recovery.settings import VALIDATION, Recovery
from prunekit.runtime.modes import keep_modes, restoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recovery: Recovery,
    *,
    known: Mapping[str, Any],
    seed: int,
    folder: Path,
    teacher: PreTrainedModel | None = None,
    watch: Mapping[str, Callable[[Any], float]] | None = None,
    modules: Mapping[str, Collection[str]] | None = None,
    resume: bool = False,
    base: str | None = None,
    data: Data | None = None,
    updates: Mapping[str, Factors] | None = None,
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
        tokenizer: the tokenizer of the model.
        recovery: what to do.
        known: the configuration's `corpora`.
        seed: used where `recovery.seed` is None.
        folder: checkpoints live in `folder/checkpoints` while it runs; those of a run that was cut
            short are what `resume` goes on from, and they are read with `weights_only`.
        teacher: the dense model, for distillation; moved to the model's device.
        watch: corpus → a function that gives the model's perplexity on it; called on the model in
            evaluation mode, by every process.
        modules: "mlp" and "attention" → names of their linears, for `recovery.targets`.
        resume: go on from the newest checkpoint, if there is one.
        base: what the adapter's config names as the model below it; `folder/model` where None.
        data: what `prepare` gave, if it was called before.
        updates: name of a weight → U [out, r] and V [r, in], whose product the weight holds:
            adapters take it out and go on from there. Without adapters it stays where it is.

    Raises:
        ConfigError: settings that don't fit the model or each other.
        DataError: a corpus that can't be used, a loss that is not finite, memory that does not
            suffice.
    """
    began = time.perf_counter()
    watch = watch or {}
    _check_teacher(recovery, teacher)
    updates = updates if updates and recovery.lora else {}
    for factors in updates.values():
        recovery.check_rank(factors[0].shape[1])
    data = data or prepare(model, tokenizer, recovery, known=known, seed=seed, watch=watch)
    session = Session(
        model=model,
        recovery=recovery,
        data=data,
        teacher=teacher if recovery.needs_teacher else None,
        watch=watch,
        folder=folder,
        seed=seed if recovery.seed is None else recovery.seed,
        pad=pad_token(tokenizer),
        updates=updates,
    )
    if recovery.pack:
        check_packing(model, data.training, session.pad)
    # The trainer puts the teacher, which may be the caller's own model, into evaluation mode.
    modes = [keep_modes(session.teacher)] if session.teacher is not None else []
    with restoring(*modes), adapters.unchanged(model):
        trainer, best_step = session.run(modules, base or str(folder / "model"), resume)
    return session.describe(trainer, best_step, time.perf_counter() - began)


def _check_teacher(recovery: Recovery, teacher: PreTrainedModel | None) -> None:
    if recovery.needs_teacher and teacher is None:
        raise ConfigError(
            "recovery.kl and recovery.hidden: expected a teacher, the dense model, got none"
        )


def prepare(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recovery: Recovery,
    *,
    known: Mapping[str, Any],
    seed: int,
    watch: Collection[str],
) -> Data:
    """The rows of a recovery, loaded before anything long begins.

    Arguments and errors are those of `recover`.
    """
    names = [VALIDATION, *watch]
    if recovery.patience is not None and recovery.stop_on not in names:
        raise ConfigError(
            f"recovery.stop_on: unknown name {recovery.stop_on!r}: "
            f"{suggest(recovery.stop_on, names)}"
        )
    check_length("recovery.length", recovery.length, model)
    return load_data(recovery, tokenizer, known, seed if recovery.seed is None else recovery.seed)
