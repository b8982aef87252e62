"""lm-eval's tasks by name, with their official prompts and metrics, over rows from the hub or from
local files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prunekit.errors import ConfigError, DataError
from prunekit.evaluation.task_files import (
    LocalFiles,
    Splits,
    first_line,
    listed,
    say_once,
    unreadable,
)

_GROUP_KEYS = {
    "group",
    "group_alias",
    "task",
    "aggregate_metric_list",
    "metadata",
    "tag",
    "include",
}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One task to run: its name, its configuration (functions by name), what a group changes in it,
    and that group.
    """

    name: str
    config: Mapping[str, Any]
    changes: Mapping[str, Any]
    group: str | None = None


@functools.cache
def manager() -> Any:
    """lm-eval's index of tasks (seconds to build)."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def members(names: Sequence[str]) -> list[Member]:
    """The tasks that names of tasks, groups and tags stand for; `group` is set where the group has
    a score of its own.

    Raises:
        ConfigError: an unknown name, a task asked for twice, one that runs generated code.
    """
    if not names:
        raise ConfigError("eval.tasks: expected at least one name, got none")
    for name in names:
        if name not in manager().task_index:
            near = get_close_matches(name, manager().all_tasks, n=4, cutoff=0.5)
            known = f"of lm-eval's {len(manager().all_tasks):,} names the nearest: {', '.join(near) or 'none'}"
            raise ConfigError(f"eval.tasks: unknown task {name!r}; {known}")
    found = [
        Member(
            name=task,
            config=config_of(task) | changes,
            changes=changes,
            group=name if _aggregates(name) else None,
        )
        for name in names
        for task, changes in _expand(name)
    ]
    for at, member in enumerate(found):
        if member.name in {other.name for other in found[:at]}:
            raise ConfigError(f"eval.tasks: {member.name} is asked for twice in {', '.join(names)}")
        if member.config.get("unsafe_code"):
            raise ConfigError(
                f"eval.tasks: {member.name} runs code that the model writes; prunekit doesn't"
            )
    return found


def config_of(name: str) -> dict[str, Any]:
    """The configuration of a task or a group as its YAML has it; empty for a tag."""
    return dict(manager().task_index[name].cfg or {})


def _aggregates(name: str) -> bool:
    return "group" in config_of(name) and bool(config_of(name).get("aggregate_metric_list"))


def _expand(name: str) -> list[tuple[str, dict[str, Any]]]:
    """The tasks under a name, and what groups on the way change in them."""
    config = config_of(name)
    if not config:
        return [(task, {}) for task in sorted(manager().task_index[name].tags)]
    if "group" not in config:
        return [(name, {})]
    tasks = []
    for item in config["task"] if isinstance(config["task"], list) else [config["task"]]:
        changes = {} if isinstance(item, str) else dict(item)
        child = item if isinstance(item, str) else changes.pop("task", None)
        if config.keys() - _GROUP_KEYS or "group" in changes or child not in manager().task_index:
            raise ConfigError(
                f"eval.tasks: {name} defines its tasks in place; name single tasks instead"
            )
        tasks += [(task, own | changes) for task, own in _expand(child)]
    return tasks


def load(
    names: Sequence[str], tasks_dir: Path | None, fewshot: int | None = None, seed: int = 0
) -> list[tuple[Member, Any]]:
    """The members of `names` as lm-eval tasks with their rows.

    Raises:
        ConfigError: see `members`; a package that a task needs is missing.
        DataError: rows that can't be had, a file that lacks columns.
    """
    wanted = members(names)
    if tasks_dir is None:
        return [(member, build(member, None, fewshot, seed)) for member in wanted]
    files = LocalFiles(Path(tasks_dir))
    local = [(member, files.splits(member.config, shots_of(member, fewshot))) for member in wanted]
    _tell_absent(local, files.root)
    return [(member, build(member, splits, fewshot, seed)) for member, splits in local if splits]


def shots_of(member: Member, fewshot: int | None) -> int:
    """Examples before each question: as asked for, unless the task fixes none (lm-eval's rule)."""
    own = member.config.get("num_fewshot")
    return int(own or 0) if fewshot is None or own == 0 else fewshot


def _tell_absent(local: Sequence[tuple[Member, Splits | None]], root: Path) -> None:
    """A group runs the members that have rows, said aloud; a task that was named must have them."""
    for group in dict.fromkeys(member.group for member, _ in local):
        own = [(member.name, splits) for member, splits in local if member.group == group]
        there, absent = [name for name, s in own if s], [name for name, s in own if not s]
        if absent and (group is None or not there):
            raise DataError(
                f"{root}: expected a folder {group or absent[0]!r} with the task's rows, found {listed(root)}"
            )
        if absent:
            say_once(
                f"{group}: {len(there)} of {len(own)} tasks have rows in {root}: {', '.join(there)}"
            )


def build(member: Member, splits: Splits | None, fewshot: int | None, seed: int) -> Any:
    """One lm-eval task over the given rows, or over the hub's.

    Raises:
        ConfigError: a package that it needs is missing, a Python task that can't take local rows.
        DataError: the hub can't be reached, columns are missing.
    """
    if splits and "class" in member.config:
        raise ConfigError(
            f"eval.tasks: {member.name} reads from the hub only; leave it out or eval.tasks_dir unset"
        )
    rows = splits.rows if splits else None
    try:
        task = _instantiate(member, (lambda **_: rows) if splits else None)
        if splits:
            _check_columns(task)
    except ImportError as error:
        raise _missing_package(member, error) from error
    except Exception as error:
        raise (
            unreadable(member.config, splits, error) if splits else _unreachable(member, error)
        ) from error
    task.set_config("num_fewshot", shots_of(member, fewshot))
    task.set_fewshot_seed(seed)
    return task


def _instantiate(member: Member, rows: Callable[..., Any] | None) -> Any:
    """An lm-eval task, its rows from a function in place of the hub."""
    item = {"task": member.name, **member.changes, **({"custom_dataset": rows} if rows else {})}
    return next(iter(manager().load([{"group": "one", "task": [item]}])["tasks"].values()))


def check_packages(member: Member) -> None:
    """Whether a task's code can be imported; its rows are left alone.

    Raises:
        ConfigError: a package that it needs is missing.
    """

    def stop(**_: Any) -> Any:
        raise LookupError

    if "class" in member.config:  # these load their rows at once
        return
    try:
        _instantiate(member, stop)
    except ImportError as error:
        raise _missing_package(member, error) from error
    except Exception:  # everything else is told when its rows are there
        return


def _missing_package(member: Member, error: ImportError) -> ConfigError:
    return ConfigError(f"eval.tasks: {member.name}: a package is missing: {first_line(error)}")


def _check_columns(task: Any) -> None:
    """lm-eval takes the name of a column that isn't there for the text itself."""
    for field in (task.config.doc_to_text, task.config.doc_to_target, task.config.doc_to_choice):
        if isinstance(field, str) and field.isidentifier() and field not in task.features:
            raise KeyError(field)


def _unreachable(member: Member, error: Exception) -> DataError:
    source = member.config.get("dataset_path")
    return DataError(
        f"task {member.name}: can't load {source} from the hub (eval.tasks_dir takes local files): {first_line(error)}"
    )
