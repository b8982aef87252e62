"""Runs one lm-eval task on the live model: as it is and where it is, in batches that fit."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import random
from collections.abc import Iterator
from typing import Any

import torch

from prunekit.errors import ConfigError, DataError
from prunekit.evaluation.task_files import first_line, say_once
from prunekit.runtime.console import say
from prunekit.runtime.memory import run_within_memory
from prunekit.runtime.modes import evaluating

BOOTSTRAP = 1000  # draws for the error of metrics that are no mean
_LARGEST_BATCH = 64


class Runner:
    """lm-eval's wrapper around the live model, and the batch that fits."""

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int | str, device: Any, seed: int
    ) -> None:
        self.model, self.tokenizer, self.device, self.seed = (
            model,
            copy.deepcopy(tokenizer),
            device,
            seed,
        )
        self.auto = batch_size == "auto"
        if not self.auto and not (isinstance(batch_size, int) and batch_size > 0):
            raise ConfigError(
                f"eval.batch_size: expected a positive number or auto, got {batch_size!r}"
            )
        self.batch_size = batch_size

    def run(self, name: str, task: Any, limit: int | None) -> dict[str, Any]:
        """The metrics of one task as lm-eval names them ("acc,none"), with `sample_len`.

        Raises:
            DataError: memory that doesn't suffice, a window that the task's answers don't fit in.
        """
        window, longest = self._wrap(1).max_length, self._longest(task)
        if longest > window:
            say_once(
                f"{name}: requests have up to {longest} tokens, the model's window {window}: their beginnings are cut"
            )
        size = self._fitting(min(longest, window)) if self.auto else int(self.batch_size)

        def shrink(size: int, error: Exception) -> int:
            if size > 1 and self.auto:
                return size // 2
            halved = (
                f"set eval.batch_size={size // 2} or auto" if size > 1 else "nothing left to halve"
            )
            raise DataError(
                f"task {name}: out of memory with eval.batch_size={size}: {halved}"
            ) from error

        try:
            return run_within_memory(
                lambda size: self._attempt(task, size, limit),
                size,
                shrink,
                lambda _, size: say(f"{name}: out of memory, again with batch size {size}"),
            )
        except AssertionError as error:  # so lm-eval says that an answer doesn't fit
            reason = first_line(error)
            raise DataError(
                f"task {name}: too long for the model's window of {window} tokens: {reason}"
            ) from error

    def _attempt(self, task: Any, size: int, limit: int | None) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate

        for instance in task.instances:
            instance.resps = []
        task.build_all_requests = lambda **_: None  # they are there
        torch.manual_seed(self.seed)
        tasks = {"tasks": {task.task_name: task}, "groups": {}}
        found = evaluate(
            self._wrap(size), tasks, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False
        )["results"][task.task_name]
        return {
            key: value if isinstance(value, str) else float(value)
            for key, value in found.items()
            if "," in key
        } | {"sample_len": int(found["sample_len"])}

    def _wrap(self, size: int) -> Any:
        from lm_eval.models.huggingface import HFLM

        self.model.tie_weights = lambda *_, **__: (
            None
        )  # HFLM would call it; the weights are to stay
        try:
            wrapped = HFLM(
                pretrained=self.model, tokenizer=self.tokenizer, backend="causal", batch_size=size
            )
        finally:
            del self.model.tie_weights
        if self.device is not None:
            wrapped._device = torch.device(self.device)
        return wrapped

    def _longest(self, task: Any) -> int:
        texts = (
            "".join(part for part in instance.args if isinstance(part, str))
            for instance in task.instances
        )
        return len(self.tokenizer(max(texts, key=len))["input_ids"])

    def _fitting(self, length: int) -> int:
        """Rows whose logits in float32, held three times, take half of the GPU's free memory, or 1
        GiB elsewhere.
        """
        device = torch.device(self.device or self.model.device)
        free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30
        return max(1, min(_LARGEST_BATCH, free // (12 * length * len(self.tokenizer))))


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Put back the training mode of every module and the states of the random generators."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(), evaluating(model):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the loggers and the progress bars (on standard error) of lm-eval and its libraries."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
