"""Accuracy on lm-eval's tasks: official prompts, answered by the live model, official metrics.

A model chooses the answer argmax over choices of log p(choice | question), which `acc` counts; for
`acc_norm` the log-probability is divided by the number of the choice's characters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prunekit.evaluation.cache import Cache
from prunekit.evaluation.task_index import find_members
from prunekit.evaluation.task_loading import (
    LoadedTask,
    check_packages,
    load_tasks,
    passing_on_errors,
)
from prunekit.evaluation.task_runner import BOOTSTRAP, Runner, leaving_unchanged, without_chatter
from prunekit.evaluation.task_scores import Metrics, TaskScore, score_tasks
from prunekit.runtime.console import track
from prunekit.runtime.files import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_tasks(names: Sequence[str], tasks_dir: Path | None, fewshot: int | None = None) -> None:
    """Whether the tasks exist, and with `tasks_dir`, whether they can read their first rows.

    The hub is left alone.

    Raises:
        ConfigError: an unknown name (the nearest ones are named), a task asked for twice, a missing
            package.
        DataError: local files that are missing or broken, or lack columns.
    """
    with without_chatter():
        if tasks_dir is None:
            for member in find_members(names):
                check_packages(member)
        else:
            load_tasks(names, tasks_dir, fewshot)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int | str = "auto",
    seed: int = 0,
    cache: Cache | None = None,
    device: torch.device | str | None = None,
) -> dict[str, TaskScore]:
    """Run lm-eval's tasks in this process on a causal language model, which is left as it was.

    Args:
        model: the live model, on any device or several, in any dtype.
        tokenizer: the tokenizer of the model.
        names: tasks, groups or tags of lm-eval.
        tasks_dir: a folder of `<task>/<split>.parquet|.jsonl|.json` in the hub's columns; None: the
            rows come from the hub.
        limit: questions of each task; None: all.
        fewshot: examples before each question; None: the task's own number.
        batch_size: requests at once, or "auto": what should fit, halved when memory runs out.
        seed: of the few-shot examples, and of what a task draws.
        cache: known results of this model, which are not computed again; new ones are put there.
            Where it is shared, all processes call this at the same time, with the same model: each
            answers a part of the requests.
        device: where inputs go, `model.device` by default.

    Returns:
        Task or group → score; "average" where several tasks with accuracies were asked for.

    Raises:
        ConfigError: see `check_tasks`.
        DataError: see `check_tasks`; rows that a task can't turn into requests or can't score, a
            window that is too small for a task, memory that does not suffice.
    """
    metrics: dict[str, Metrics] = {}
    cache = cache or Cache()
    with without_chatter(), leaving_unchanged(model):
        runner = Runner(model, tokenizer, batch_size, device, seed, cache.shared)
        loaded = load_tasks(names, tasks_dir, fewshot, seed)
        for one in track(loaded, "lm-eval tasks", len(loaded)):
            with passing_on_errors(one.member, one.splits):
                one.task.build_all_requests(limit=limit)
            key = _key(one, tokenizer, seed)
            metrics[one.member.name] = cache.remember(key, partial(runner.run, one, limit))
        return score_tasks(loaded, metrics)


def _key(loaded: LoadedTask, tokenizer: PreTrainedTokenizerBase, seed: int) -> str:
    """A text of all that the metrics of a task depend on, apart from the model."""
    from importlib.metadata import version

    task: Any = loaded.task
    config = {
        key: value
        for key, value in task.config.to_dict().items()
        if key not in ("custom_dataset", "metadata")
    }
    facts = (version("lm-eval"), task.VERSION, config, seed, BOOTSTRAP, _tokenizer_state(tokenizer))
    requests = ([instance.request_type, instance.args, instance.doc] for instance in task.instances)
    return digest(_to_text(part) for part in (*facts, *requests))


def _to_text(value: Any) -> str:
    """The value as JSON; functions by name, for lm-eval's version stands for their code."""
    return json.dumps(value, sort_keys=True, default=lambda v: getattr(v, "__qualname__", str(v)))


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What the tokenizer does with a text.

    Padding and truncation are left out, for every call sets them anew.
    """
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__, special, tokenizer.get_vocab()]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return [special, {key: state[key] for key in state if key not in ("padding", "truncation")}]
