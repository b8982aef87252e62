"""What the tasks' entries say: which are members of a group, which are shares, how a score is
written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunekit.report import words

AVERAGE = "average"


def average_last(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The tasks in order without members of groups; their average last."""
    tasks = {name: task for name, task in (report.get("tasks") or {}).items() if "of" not in task}
    average = tasks.pop(AVERAGE, None)
    return tasks if average is None else tasks | {AVERAGE: average}


def members(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The tasks that are members of a group: an MMLU's subjects."""
    return {name: task for name, task in (report.get("tasks") or {}).items() if "of" in task}


def is_share(task: Mapping[str, Any], columns: Sequence[str]) -> bool:
    """Whether the scores lie in [0, 1]; accuracies do, perplexities and scores out of a hundred
    don't.
    """
    values = [task[column]["value"] for column in columns if column in task]
    return bool(values) and all(0 <= value <= 1 for value in values)


def score(task: Mapping[str, Any], column: str, share: bool) -> str:
    """52.0% ± 2.0, or 13.31 ± 0.20."""
    if column not in task:
        return words.NONE
    value, error = task[column]["value"], task[column].get("stderr")
    text = words.percent(value) if share else words.decimal(value)
    return (
        text
        if error is None
        else f"{text} ± {100 * error:.1f}"
        if share
        else f"{text} ± {words.decimal(error)}"
    )


def difference(task: Mapping[str, Any], columns: Sequence[str], share: bool) -> str:
    """The last column against the first: in points where the scores are shares, in percent
    otherwise.
    """
    first, last = (task.get(column, {}).get("value") for column in (columns[0], columns[-1]))
    if not share or first is None or last is None:
        return words.change(first, last)
    return f"{100 * (last - first):+.1f} points"
