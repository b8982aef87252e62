"""lm-eval's tasks by name: the tasks that names of tasks, groups and tags stand for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from prunekit.errors import ConfigError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# What a group's configuration may hold; anything else changes the tasks of the group.
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
class TaskMember:
    """One task to run.

    Attributes:
        name: lm-eval's name of the task.
        config: the task's configuration as lm-eval's YAML has it, functions by their names.
        changes: what a group changes in the configuration.
        group: the group of the task, where the group has a score of its own.
    """

    name: str
    config: Mapping[str, Any]
    changes: Mapping[str, Any]
    group: str | None = None

    def shots(self, asked: int | None) -> int:
        """Examples before each question: as asked for, unless the task fixes none.

        lm-eval has the same rule.
        """
        own = self.config.get("num_fewshot")
        return int(own or 0) if asked is None or own == 0 else asked


@functools.cache
def task_manager() -> TaskManager:
    """lm-eval's index of tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def find_members(names: Sequence[str]) -> list[TaskMember]:
    """The tasks that names of tasks, groups and tags stand for.

    Raises:
        ConfigError: no name, an unknown one, a task asked for twice, one that runs generated code.
    """
    if not names:
        raise ConfigError("eval.tasks: expected at least one name, got none")
    members: dict[str, TaskMember] = {}
    for name in names:
        _check_name(name)
        group = name if config_of(name).get("aggregate_metric_list") else None
        for task, changes in _expand(name):
            if task in members:
                raise ConfigError(f"eval.tasks: {task} is asked for twice in {', '.join(names)}")
            config = config_of(task) | changes
            if config.get("unsafe_code"):
                raise ConfigError(
                    f"eval.tasks: {task} runs code that the model writes; prunekit doesn't"
                )
            members[task] = TaskMember(name=task, config=config, changes=changes, group=group)
    return list(members.values())


def config_of(name: str) -> dict[str, Any]:
    """The configuration of a task or a group as its YAML has it; empty for a tag."""
    return dict(task_manager().task_index[name].cfg or {})


def _check_name(name: str) -> None:
    manager = task_manager()
    if name in manager.task_index:
        return
    near = get_close_matches(name, manager.all_tasks, n=4, cutoff=0.5)
    raise ConfigError(
        f"eval.tasks: unknown task {name!r}; of lm-eval's {len(manager.all_tasks):,} names the "
        f"nearest: {', '.join(near) or 'none'}"
    )


def _expand(name: str) -> list[tuple[str, dict[str, Any]]]:
    """The tasks under a name, with the changes that groups make in their configurations."""
    config, index = config_of(name), task_manager().task_index
    if not config:
        return [(task, {}) for task in sorted(index[name].tags)]
    if "group" not in config:
        return [(name, {})]
    tasks: list[tuple[str, dict[str, Any]]] = []
    for item in config["task"] if isinstance(config["task"], list) else [config["task"]]:
        changes = {"task": item} if isinstance(item, str) else dict(item)
        child = changes.pop("task", None)
        if config.keys() - _GROUP_KEYS or "group" in changes or child not in index:
            raise ConfigError(
                f"eval.tasks: {name} defines its tasks in place; name single tasks instead"
            )
        tasks += [(task, own | changes) for task, own in _expand(child)]
    return tasks
