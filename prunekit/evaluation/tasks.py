"""Accuracy on lm-eval's tasks: the live model answers the official prompts, scored by the official metrics.

A multiple-choice answer is argmax over choices of log p(choice | question): `acc`; divided by its bytes: `acc_norm`.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import io
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from prunekit.console import say, track
from prunekit.errors import ConfigError, DataError
from prunekit.evaluation import task_data
from prunekit.evaluation.task_files import first_line

NORMALISED = ("piqa", "hellaswag", "arc_challenge", "openbookqa")  # acc_norm, as papers on these models do
_BOOTSTRAP = 1000  # draws for the error of metrics that are no mean
_LARGEST_BATCH = 64


class Cache(Protocol):
    """Results of one model by content hash; values are plain JSON."""

    def get(self, key: str, /) -> dict[str, Any] | None:
        """What was put under the key, if anything."""

    def put(self, key: str, value: dict[str, Any], /) -> None:
        """Keep a result."""


def check_tasks(names: Sequence[str], tasks_dir: Path | None, fewshot: int | None = None) -> None:
    """Whether the tasks exist and, with `tasks_dir`, whether their files can be read; the hub is left alone.

    Raises:
        ConfigError: an unknown name (the nearest ones are named), a task asked for twice, a missing package.
        DataError: local files that are missing or broken, or lack columns.
    """
    with _quiet():
        if tasks_dir is None:
            task_data.members(names)
        else:
            task_data.load(names, tasks_dir, fewshot)


def fingerprint(
    names: Sequence[str],
    tokenizer: Any,
    *,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Task → hash of all that decides its result besides the model; groups are told by their members.

    It covers lm-eval's version, the task's configuration, every request and row, the seed and the tokenizer. What
    belongs to the model stays with the caller: weights, number type, window, torch's version.
    """
    with _quiet():
        loaded = task_data.load(names, tasks_dir, fewshot, seed)
        return {member.name: _key(_requests(member, task, limit), tokenizer, seed) for member, task in loaded}


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int | str = "auto",
    seed: int = 0,
    cache: Cache | None = None,
    device: torch.device | str | None = None,
) -> dict[str, dict[str, Any]]:
    """Run lm-eval's tasks in this process on a causal language model, which is left as it was.

    Args:
        model: the live model, on any device or several, in any dtype.
        tokenizer: its tokenizer.
        names: tasks, groups or tags of lm-eval.
        tasks_dir: a folder of `<task>/<split>.parquet|.jsonl|.json` in the hub's columns; None reads the hub.
        limit: questions of each task; None for all.
        fewshot: examples before each question; None for the task's own number.
        batch_size: requests at once, or "auto": what should fit, halved when memory runs out.
        seed: of the few-shot examples, and of sampling where a task samples.
        cache: results of this model that are known; they aren't computed again, new ones are put there.
        device: where inputs go, `model.device` by default.

    Returns:
        Task → `value`, `metric`, `stderr` (or None), `samples`, `fewshot`; members of a group have `of`, its name;
        `average` where several tasks with accuracies were asked for.

    Raises:
        ConfigError, DataError: see `check_tasks`; rows that can't be turned into requests, a window that is too small
            for a task, memory that doesn't suffice.
    """
    results: dict[str, dict[str, Any]] = {}
    with _quiet(), _unchanged(model):
        loaded = task_data.load(names, tasks_dir, fewshot, seed)
        for member, task in track(loaded, "lm-eval tasks", len(loaded)):
            key = _key(_requests(member, task, limit), tokenizer, seed)
            known = cache.get(key) if cache else None
            if known is None:
                known = _Runner(model, tokenizer, batch_size, device, seed).run(member.name, task, limit)
                if cache:
                    cache.put(key, known)
            results[member.name] = known
        return _rows(names, loaded, results)


class _Runner:
    """lm-eval's wrapper around the live model, and the batch that fits."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int | str, device: Any, seed: int) -> None:
        self.model, self.tokenizer, self.device, self.seed = model, copy.deepcopy(tokenizer), device, seed
        self.auto = batch_size == "auto"
        if not self.auto and not (isinstance(batch_size, int) and batch_size > 0):
            raise ConfigError(f"eval.task_batch_size: expected a positive number or auto, got {batch_size!r}")
        self.batch_size = batch_size

    def run(self, name: str, task: Any, limit: int | None) -> dict[str, Any]:
        """The metrics of one task as lm-eval names them ("acc,none"), with `sample_len`."""
        size = self._fitting(task) if self.auto else int(self.batch_size)
        while True:
            try:
                return self._attempt(task, size, limit)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if not self.auto or size == 1:
                    hint = f"halve eval.task_batch_size to {size // 2}" if size > 1 else "it needs a smaller model"
                    raise DataError(f"task {name}: out of memory at batch size {size}: {hint}") from error
            except AssertionError as error:  # lm-eval asserts that answers and generations fit
                window = self._wrap(1).max_length
                raise DataError(
                    f"task {name}: it doesn't fit the model's window of {window} tokens: {first_line(error)}"
                ) from error
            size //= 2
            _free_memory()
            say(f"{name}: out of memory, again with batch size {size}")

    def _attempt(self, task: Any, size: int, limit: int | None) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate

        for instance in task.instances:
            instance.resps = []
        task.build_all_requests = lambda **_: None  # they are there
        torch.manual_seed(self.seed)
        tasks = {"tasks": {task.task_name: task}, "groups": {}}
        found = evaluate(
            self._wrap(size), tasks, limit=limit, bootstrap_iters=_BOOTSTRAP, log_samples=False
        )["results"][task.task_name]
        return {key: value if isinstance(value, str) else float(value) for key, value in found.items() if "," in key} | {
            "sample_len": int(found["sample_len"])
        }

    def _wrap(self, size: int) -> Any:
        from lm_eval.models.huggingface import HFLM

        self.model.tie_weights = lambda *_, **__: None  # HFLM would call it; the weights are to stay
        try:
            wrapped = HFLM(pretrained=self.model, tokenizer=self.tokenizer, backend="causal", batch_size=size)
        finally:
            del self.model.tie_weights
        if self.device is not None:
            wrapped._device = torch.device(self.device)
        return wrapped

    def _fitting(self, task: Any) -> int:
        """Rows whose logits in float32, held three times, take half the GPU's free memory, or 1 GiB elsewhere."""
        texts = ("".join(part for part in i.args if isinstance(part, str)) for i in task.instances)
        length = min(len(self.tokenizer(max(texts, key=len))["input_ids"]), self._wrap(1).max_length)
        device = torch.device(self.device or self.model.device)
        free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30
        return max(1, min(_LARGEST_BATCH, free // (12 * length * len(self.tokenizer))))


def _out_of_memory(error: BaseException) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)  # type: ignore[arg-type]


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _requests(member: task_data.Member, task: Any, limit: int | None) -> Any:
    try:
        task.build_all_requests(limit=limit)
    except Exception as error:
        raise DataError(f"task {member.name}: its rows can't be turned into requests: {first_line(error)}") from error
    return task


def _key(task: Any, tokenizer: Any, seed: int) -> str:
    from importlib.metadata import version

    config = {key: value for key, value in task.config.to_dict().items() if key not in ("custom_dataset", "metadata")}
    digest = hashlib.sha256()
    for part in (version("lm-eval"), task.VERSION, config, seed, _BOOTSTRAP, _tokenizer_state(tokenizer)):
        digest.update(_plain(part))
    for instance in task.instances:
        digest.update(_plain([instance.request_type, instance.args, instance.doc]))
    return digest.hexdigest()


def _plain(value: Any) -> bytes:
    """JSON; functions by name, since lm-eval's version says what they do."""
    return json.dumps(value, sort_keys=True, default=lambda v: getattr(v, "__qualname__", str(v))).encode() + b"\n"


def _tokenizer_state(tokenizer: Any) -> Any:
    """What the tokenizer does with a text; padding and truncation aside, which every call sets anew."""
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__, special, tokenizer.get_vocab()]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return [special, {key: value for key, value in state.items() if key not in ("padding", "truncation")}]


def _rows(
    names: Sequence[str], loaded: Sequence[tuple[task_data.Member, Any]], results: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The rows of groups, before their members', and of tasks; then the average of those on top."""
    rows: dict[str, dict[str, Any]] = {}
    for member, task in loaded:
        if member.group and member.group not in rows:
            own = [task for other, task in loaded if other.group == member.group]
            rows[member.group] = _group_row(member.group, own, results)
        of = {"of": member.group} if member.group else {}
        metric = _main_metric(member.name, results[member.name])
        rows[member.name] = _row(results[member.name], metric, task.config.num_fewshot) | of
    top = [row for row in rows.values() if "of" not in row]
    metrics = dict.fromkeys(row["metric"] for row in top)
    if len(top) > 1 and metrics.keys() <= {"acc", "acc_norm"}:
        rows["average"] = {
            "value": sum(row["value"] for row in top) / len(top),
            "metric": f"mean of {' and '.join(metrics)}",
            "stderr": None,
            "samples": sum(row["samples"] for row in top),
            "fewshot": top[0]["fewshot"] if len({row["fewshot"] for row in top}) == 1 else None,
        }
    return rows


def _group_row(name: str, tasks: Sequence[Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's own aggregate, over the members that ran."""
    from dataclasses import fields

    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    known = {field.name for field in fields(GroupConfig)}
    group = Group.from_config({key: value for key, value in task_data.config_of(name).items() if key in known})
    for task in tasks:
        group.add(task)
    found: Any = group.aggregate({task.task_name: results[task.task_name] for task in tasks})
    metric = next(key for key in found if "," in key and "_stderr" not in key)
    return _row(found, metric, tasks[0].config.num_fewshot)


def _main_metric(name: str, found: Mapping[str, Any]) -> str:
    """The metric that papers give: `acc_norm` for some tasks, else `acc`, else the first that says what it is."""
    keys = [key for key in found if "," in key and "_stderr" not in key]
    for wanted in ("acc_norm",) if name in NORMALISED else ("acc",):
        if any(key.startswith(f"{wanted},") for key in keys):
            return next(key for key in keys if key.startswith(f"{wanted},"))
    return next((key for key in keys if not key.startswith("score,")), keys[0])


def _row(found: Mapping[str, Any], key: str, fewshot: int) -> dict[str, Any]:
    metric, variant = key.split(",", 1)
    stderr = found.get(f"{metric}_stderr,{variant}")
    return {
        "value": float(found[key]),
        "metric": metric,
        "stderr": None if stderr is None or isinstance(stderr, str) else float(stderr),
        "samples": int(found["sample_len"]),
        "fewshot": fewshot,
    }


@contextlib.contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Put back the training mode of every module and the states of the random generators."""
    import numpy

    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        numpy.random.set_state(states[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
