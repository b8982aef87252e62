"""Accuracy on lm-eval's tasks: the live model answers the official prompts, scored by the official metrics.

The answer is argmax over choices of log p(choice | question): `acc`; of that divided by its characters: `acc_norm`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from prunekit.console import track
from prunekit.errors import DataError
from prunekit.evaluation import task_data
from prunekit.evaluation.task_files import first_line
from prunekit.evaluation.task_runner import BOOTSTRAP, Runner, quiet, unchanged

NORMALISED = ("piqa", "hellaswag", "arc_challenge", "openbookqa")  # acc_norm, as papers on these models do


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
    with quiet():
        if tasks_dir is None:
            for member in task_data.members(names):
                task_data.check_packages(member)
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
    with quiet():
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
    with quiet(), unchanged(model):
        loaded = task_data.load(names, tasks_dir, fewshot, seed)
        for member, task in track(loaded, "lm-eval tasks", len(loaded)):
            key = _key(_requests(member, task, limit), tokenizer, seed)
            known = None if cache is None else cache.get(key)
            if known is None:
                known = Runner(model, tokenizer, batch_size, device, seed).run(member.name, task, limit)
                if cache is not None:
                    cache.put(key, known)
            results[member.name] = known
        return _rows(names, loaded, results)


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
    for part in (version("lm-eval"), task.VERSION, config, seed, BOOTSTRAP, _tokenizer_state(tokenizer)):
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
