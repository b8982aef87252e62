"""Accuracy on lm-eval's tasks: the live model answers the official prompts, scored by the official
metrics.

The answer is argmax over choices of log p(choice | question): `acc`; of that divided by its
characters: `acc_norm`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunekit.errors import DataError
from prunekit.evaluation import task_data
from prunekit.evaluation.cache import Cache
from prunekit.evaluation.task_files import first_line
from prunekit.evaluation.task_runner import BOOTSTRAP, Runner, quiet, unchanged
from prunekit.evaluation.task_scores import Metrics, TaskScore, score_tasks
from prunekit.runtime.console import track
from prunekit.runtime.files import digest


def check_tasks(names: Sequence[str], tasks_dir: Path | None, fewshot: int | None = None) -> None:
    """Whether the tasks exist and, with `tasks_dir`, whether their files can be read; the hub is
    left alone.

    Raises:
        ConfigError: an unknown name (the nearest ones are named), a task asked for twice, a missing
            package.
        DataError: local files that are missing or broken, or lack columns.
    """
    with quiet():
        if tasks_dir is None:
            for member in task_data.members(names):
                task_data.check_packages(member)
        else:
            task_data.load(names, tasks_dir, fewshot)


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
) -> dict[str, TaskScore]:
    """Run lm-eval's tasks in this process on a causal language model, which is left as it was.

    Args:
        model: the live model, on any device or several, in any dtype.
        tokenizer: its tokenizer.
        names: tasks, groups or tags of lm-eval.
        tasks_dir: a folder of `<task>/<split>.parquet|.jsonl|.json` in the hub's columns; None
            reads the hub.
        limit: questions of each task; None for all.
        fewshot: examples before
            each question; None for the task's own number.
        batch_size: requests at once, or "auto":
            what should fit, halved when memory runs out.
        seed: of the few-shot examples, and of
            sampling where a task samples.
        cache: results of this model that are known; they aren't
            computed again, new ones are put there.
        device: where inputs go, `model.device` by
            default.

    Returns:
        Task or group → score; "average" where several tasks with accuracies were asked for.

    Raises:
        ConfigError,
        DataError: see `check_tasks`; rows that can't be turned into requests, a window
            that is too small for a task, memory that doesn't suffice.
    """
    results: dict[str, Metrics] = {}
    cache = cache or Cache()
    with quiet(), unchanged(model):
        loaded = task_data.load(names, tasks_dir, fewshot, seed)
        for member, task in track(loaded, "lm-eval tasks", len(loaded)):
            key = _key(_requests(member, task, limit), tokenizer, seed)
            runner = Runner(model, tokenizer, batch_size, device, seed)
            results[member.name] = cache.remember(
                key, partial(runner.run, member.name, task, limit)
            )
        return score_tasks(loaded, results)


def _requests(member: task_data.Member, task: Any, limit: int | None) -> Any:
    """The task with its requests built, its metric tried on the first row."""
    try:
        task.build_all_requests(limit=limit)
    except Exception as error:
        raise DataError(
            f"task {member.name}: its rows can't be turned into requests: {first_line(error)}"
        ) from error
    first = task.instances[0]
    answers = {"generate_until": "a", "loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0}
    asked = [instance for instance in task.instances if instance.doc_id == first.doc_id]
    try:
        task.process_results(first.doc, [answers[instance.request_type] for instance in asked])
    except KeyError as error:
        found = ", ".join(first.doc)
        raise DataError(
            f"task {member.name}: its metric reads a column {error}; found {found}"
        ) from error
    except Exception:  # the answer is made up; real ones are scored, or refused, below
        pass
    return _refusing(member, task)


def _refusing(member: task_data.Member, task: Any) -> Any:
    """A row that the metric can't score is the data's fault."""
    score = task.process_results

    def scored(doc: Any, results: Any) -> Any:
        try:
            return score(doc, results)
        except Exception as error:
            raise DataError(
                f"task {member.name}: a row can't be scored: {first_line(error)}: {doc}"[:400]
            ) from error

    task.process_results = scored
    return task


def _key(task: Any, tokenizer: Any, seed: int) -> str:
    from importlib.metadata import version

    config = {
        key: value
        for key, value in task.config.to_dict().items()
        if key not in ("custom_dataset", "metadata")
    }
    facts = (version("lm-eval"), task.VERSION, config, seed, BOOTSTRAP, _tokenizer_state(tokenizer))
    requests = ([instance.request_type, instance.args, instance.doc] for instance in task.instances)
    return digest(_plain(part) for part in (*facts, *requests))


def _plain(value: Any) -> str:
    """JSON; functions by name, since lm-eval's version says what they do."""
    return json.dumps(value, sort_keys=True, default=lambda v: getattr(v, "__qualname__", str(v)))


def _tokenizer_state(tokenizer: Any) -> Any:
    """What the tokenizer does with a text; padding and truncation aside, which every call sets
    anew.
    """
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    if not tokenizer.is_fast:
        return [type(tokenizer).__name__, special, tokenizer.get_vocab()]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return [
        special,
        {key: value for key, value in state.items() if key not in ("padding", "truncation")},
    ]
