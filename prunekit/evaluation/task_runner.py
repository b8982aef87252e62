"""Run a task of lm-eval on a model in memory, on its device, in batches that fit into memory."""

from __future__ import annotations

import contextlib
import copy
import io
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from prunekit.errors import ConfigError, DataError, first_line
from prunekit.evaluation.task_loading import LoadedTask, passing_on_errors
from prunekit.evaluation.task_messages import say_once
from prunekit.evaluation.task_scores import Metrics
from prunekit.runtime.console import quiet, say
from prunekit.runtime.memory import free_bytes, out_of_memory, run_within_memory
from prunekit.runtime.modes import evaluating, keep_attributes, restoring
from prunekit.runtime.processes import from_first, gather_all, in_order, own_part, together

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAP = 1000  # draws for the standard error of metrics that are no mean
_LARGEST_BATCH = 64


class Runner:
    """Runs tasks on a model, by lm-eval's wrapper of it, in batches that fit into memory.

    Args:
        model: a causal language model.
        tokenizer: the tokenizer of the model; lm-eval gets a copy, for it changes it.
        batch_size: requests at once, or "auto": halved until they fit in memory.
        device: where inputs go; None: `model.device`.
        seed: of what tasks draw.
        shared: all processes run the same tasks at the same time, each on a part of the requests.

    Raises:
        ConfigError: a batch size that is neither a positive number nor "auto".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str,
        device: torch.device | str | None,
        seed: int,
        shared: bool = False,
    ) -> None:
        if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size > 0):
            raise ConfigError(
                f"eval.batch_size: expected a positive number or auto, got {batch_size!r}"
            )
        self.model, self.tokenizer = model, copy.deepcopy(tokenizer)
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self.shared = shared

    def run(self, loaded: LoadedTask, limit: int | None) -> Metrics:
        """The metrics of one task by lm-eval's names ("acc,none"), and `sample_len`.

        Args:
            loaded: the task, its requests built.
            limit: questions to ask at most; None: all.

        Raises:
            DataError: memory that does not suffice, a window that the task's answers don't fit in,
                rows that the task's metric can't score.
        """
        with together() if self.shared else contextlib.nullcontext():
            return self._run(loaded, limit)

    def _run(self, loaded: LoadedTask, limit: int | None) -> Metrics:
        name, window, longest = loaded.member.name, self._window(), self._longest(loaded)
        too_long = longest > window
        if too_long:
            say_once(
                f"{name}: requests have up to {longest} tokens, the model's window {window}: "
                "their beginnings are cut"
            )
        size = self.batch_size
        with passing_on_errors(loaded.member, loaded.splits):
            try:
                return run_within_memory(
                    lambda size: self._attempt(loaded, size, limit),
                    size if isinstance(size, int) else self._choose_size(min(longest, window)),
                    partial(self._shrink, name),
                    lambda _, size: say(f"{name}: out of memory, again with batch size {size}"),
                )
            except AssertionError as error:  # of lm-eval, where an answer alone does not fit
                if not too_long:
                    raise
                raise DataError(
                    f"task {name}: too long for the model's window of {window} tokens: "
                    f"{first_line(error, named=True)}"
                ) from error

    def _shrink(self, name: str, size: int, error: Exception) -> int:
        if size > 1 and self.batch_size == "auto":
            return size // 2
        advice = f"set eval.batch_size={size // 2} or auto" if size > 1 else "nothing left to halve"
        raise DataError(
            f"task {name}: out of memory with eval.batch_size={size}: {advice}"
        ) from error

    def _attempt(self, loaded: LoadedTask, size: int, limit: int | None) -> Metrics:
        from lm_eval.evaluator import evaluate

        task: Any = loaded.task
        for instance in task.instances:
            instance.resps = []  # answers of an attempt that ran out of memory
        task.build_all_requests = lambda **_: None  # they are built already
        torch.manual_seed(self.seed)
        results: Any = evaluate(
            self._wrap(size),
            {"tasks": {task.task_name: task}, "groups": {}},
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
        metrics = results["results"][task.task_name]
        values = {
            key: value if isinstance(value, str) else float(value)
            for key, value in metrics.items()
            if "," in key
        }
        return values | {"sample_len": int(metrics["sample_len"])}

    def _wrap(self, size: int) -> HFLM:
        from lm_eval.models.huggingface import HFLM

        model: Any = self.model
        # lm-eval ties the weights of any model, which would give them another storage.
        with restoring(keep_attributes([model], "tie_weights")):
            model.tie_weights = lambda *_, **__: None
            wrapped = HFLM(
                pretrained=model,
                tokenizer=self.tokenizer,  # type: ignore[arg-type]
                backend="causal",
                batch_size=size,
            )
        if self.device is not None:
            wrapped._device = torch.device(self.device)
        if self.shared:
            for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(wrapped, kind, partial(answer_together, getattr(wrapped, kind)))
        return wrapped

    def _window(self) -> int:
        """Tokens that lm-eval takes the model to see at once."""
        return self._wrap(1).max_length

    def _longest(self, loaded: LoadedTask) -> int:
        """Tokens of the longest request, the one with the most characters."""
        texts = (
            "".join(part for part in instance.args if isinstance(part, str))
            for instance in loaded.task.instances
        )
        return len(self.tokenizer(max(texts, key=len))["input_ids"])

    def _choose_size(self, length: int) -> int:
        """How many requests to try at once; the same number in all processes that share them."""
        size = self._first_size(length)
        return from_first(size) if self.shared else size

    def _first_size(self, length: int) -> int:
        """How many requests to try at once.

        Their logits in float32 [size, length, vocabulary], held three times, take half of the GPU's
        free memory, or 1 GiB elsewhere.
        """
        device = torch.device(self.device or self.model.device)
        free = free_bytes(device) / 2 if device.type == "cuda" else 1 << 30
        return max(1, min(_LARGEST_BATCH, int(free) // (12 * length * len(self.tokenizer))))


def answer_together(
    answer: Callable[..., list[Any]], requests: Sequence[Any], **options: Any
) -> list[Any]:
    """Answer requests that all processes have: each a part of them; all return all answers.

    Args:
        answer: the method of lm-eval's wrapper.
        requests: the same ones in all processes.
        options: further arguments of the method.

    Raises:
        OutOfMemoryError: memory ran out in any process, so that all try again.
        DataError: what else went wrong in another process.
    """
    own, answers, failed = own_part(requests), list[Any](), None
    try:
        answers = answer(own, **options) if own else []
    except Exception as error:  # all must know, lest they wait for ever
        failed = error
    told = gather_all(None if failed is None else (out_of_memory(failed), str(failed)))
    if failed is not None:
        raise failed
    for memory, text in filter(None, told):
        raise torch.OutOfMemoryError(text) if memory else DataError(text)
    return in_order(gather_all(answers))


@contextlib.contextmanager
def leaving_unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Put back the training mode of every module and the states of the random generators."""
    import numpy

    generators = (
        partial(random.setstate, random.getstate()),
        partial(numpy.random.set_state, numpy.random.get_state()),
    )
    with restoring(*generators), torch.random.fork_rng(), evaluating(model):
        yield


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Hold back what lm-eval and its libraries log, and their progress bars on standard error."""
    with quiet("lm_eval", "transformers", "datasets"), contextlib.redirect_stderr(io.StringIO()):
        yield
