"""Loads lm-eval's tasks, official prompts and metrics, over rows of the hub or of local files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.errors import ConfigError, DataError, PrunekitError, first_line
from prunekit.evaluation.task_files import LocalFiles, Splits
from prunekit.evaluation.task_index import TaskMember, find_members, task_manager
from prunekit.evaluation.task_messages import list_folder, say_once

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import Task


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A task of lm-eval that is ready to build its requests, and its local rows, if any."""

    member: TaskMember
    task: Task
    splits: Splits | None = None

    @property
    def shots(self) -> int:
        """Examples before each question."""
        shots: Any = self.task.config.num_fewshot
        return shots


@contextmanager
def passing_on_errors(member: TaskMember, splits: Splits | None) -> Iterator[None]:
    """Raise an error of lm-eval as one line that names the task and the file of its rows."""
    try:
        yield
    except PrunekitError:
        raise
    except ImportError as error:
        raise _missing_package(member, error) from error
    except Exception as error:
        raise DataError(_describe(member, splits, error)) from error


def _describe(member: TaskMember, splits: Splits | None, error: Exception) -> str:
    if splits is None:
        return f"task {member.name}: {first_line(error, named=True)}"
    columns, cause = ", ".join(splits.columns), first_line(error, named=True)
    return f"{splits.file}: task {member.name}: {cause}; the columns are {columns}"


def load_tasks(
    names: Sequence[str], tasks_dir: Path | None, fewshot: int | None = None, seed: int = 0
) -> list[LoadedTask]:
    """The tasks that the names stand for, with their rows.

    Args:
        names: tasks, groups or tags.
        tasks_dir: the folder of local files; None: rows come from the hub.
        fewshot: examples before each question; None: each task's own number.
        seed: of the choice of these examples.

    Raises:
        ConfigError: see `find_members`; a package that a task needs is missing.
        DataError: rows that can't be had, or that the task can't read.
    """
    members = find_members(names)
    if tasks_dir is None:
        return [_load(member, None, fewshot, seed) for member in members]
    files = LocalFiles(tasks_dir)
    local = [(member, files.splits(member.config, member.shots(fewshot))) for member in members]
    _check_absent(local, files.root)
    return [_load(member, splits, fewshot, seed) for member, splits in local if splits]


def _check_absent(local: Sequence[tuple[TaskMember, Splits | None]], root: Path) -> None:
    """Raise DataError where a named task has no rows, or where no member of a group has rows.

    A group runs the members that have rows; a message lists them.
    """
    for group in dict.fromkeys(member.group for member, _ in local):
        own = [(member.name, splits) for member, splits in local if member.group == group]
        there = [name for name, splits in own if splits]
        absent = [name for name, splits in own if not splits]
        if absent and (group is None or not there):
            raise DataError(
                f"{root}: expected a folder {group or absent[0]!r} with the task's rows, "
                f"found {list_folder(root)}"
            )
        if absent:
            say_once(
                f"{group}: {len(there)} of {len(own)} tasks have rows in {root}: {', '.join(there)}"
            )


def _load(member: TaskMember, splits: Splits | None, fewshot: int | None, seed: int) -> LoadedTask:
    if splits is None:
        task = _load_from_hub(member)
    else:
        if "class" in member.config:
            raise ConfigError(
                f"eval.tasks: {member.name} reads from the hub only; leave it out or "
                "eval.tasks_dir unset"
            )
        rows = splits.rows
        with passing_on_errors(member, splits):
            task = _instantiate(member, lambda **_: rows)
            _check_columns(task)
    task.set_config("num_fewshot", member.shots(fewshot))
    task.set_fewshot_seed(seed)
    return LoadedTask(member=member, task=task, splits=splits)


def _load_from_hub(member: TaskMember) -> Any:
    try:
        return _instantiate(member, None)
    except ImportError as error:
        raise _missing_package(member, error) from error
    except Exception as error:
        raise DataError(
            f"task {member.name}: can't load {member.config.get('dataset_path')} from the hub "
            f"(eval.tasks_dir takes local files): {first_line(error, named=True)}"
        ) from error


def _instantiate(member: TaskMember, dataset: Callable[..., Mapping[str, Dataset]] | None) -> Any:
    """The task as lm-eval makes it, its rows from a function where one is given.

    lm-eval reads the first row with the task's prompt and metric here.
    """
    rows = {"custom_dataset": dataset} if dataset else {}
    item = {"task": member.name, **member.changes, **rows}
    # A task by itself would be configured from this dictionary alone, not from lm-eval's YAML.
    loaded = task_manager().load([{"group": "one", "task": [item]}])
    return next(iter(loaded["tasks"].values()))


def _check_columns(task: Any) -> None:
    """Raise KeyError for a missing column, whose name lm-eval would take for the text itself."""
    for field in (task.config.doc_to_text, task.config.doc_to_target, task.config.doc_to_choice):
        if isinstance(field, str) and field.isidentifier() and field not in task.features:
            raise KeyError(field)


def check_packages(member: TaskMember) -> None:
    """Raise ConfigError where a package that a task needs is missing; the hub is left alone."""

    def refuse(**_: Any) -> Any:
        raise LookupError

    if "class" in member.config:  # its constructor loads the rows
        return
    try:
        _instantiate(member, refuse)
    except ImportError as error:
        raise _missing_package(member, error) from error
    except Exception:  # any other error is raised again, and told, when the rows are there
        return


def _missing_package(member: TaskMember, error: ImportError) -> ConfigError:
    return ConfigError(
        f"eval.tasks: {member.name}: a package is missing: {first_line(error, named=True)}"
    )
