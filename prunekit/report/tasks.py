"""The tasks of a report: members of groups, scores that are shares, scores in writing."""

from __future__ import annotations

from collections.abc import Sequence

from prunekit.report import words
from prunekit.report.parts import TaskScores
from prunekit.report.record import Report

AVERAGE = "average"


def average_last(report: Report) -> dict[str, TaskScores]:
    """The tasks in order without members of groups; their average last."""
    tasks = {name: task for name, task in (report.tasks or {}).items() if task.of is None}
    average = tasks.pop(AVERAGE, None)
    return tasks if average is None else tasks | {AVERAGE: average}


def members(report: Report) -> dict[str, TaskScores]:
    """The tasks that are members of a group, as MMLU's subjects are."""
    return {name: task for name, task in (report.tasks or {}).items() if task.of is not None}


def is_share(task: TaskScores, columns: Sequence[str]) -> bool:
    """Whether the scores lie in [0, 1].

    Accuracies do; perplexities and scores out of a hundred don't.
    """
    values = [task.columns[column].value for column in columns if column in task.columns]
    return bool(values) and all(0 <= value <= 1 for value in values)


def score(task: TaskScores, column: str, share: bool) -> str:
    """A score with its standard error: 52.0% ± 2.0 for a share, 13.31 ± 0.20 otherwise."""
    if column not in task.columns:
        return words.NONE
    value, error = task.columns[column].value, task.columns[column].stderr
    text = words.percent(value) if share else words.decimal(value)
    if error is None:
        return text
    return f"{text} ± {100 * error:.1f}" if share else f"{text} ± {words.decimal(error)}"


def difference(task: TaskScores, columns: Sequence[str], share: bool) -> str:
    """The last column against the first: in points where the scores are shares, else in percent."""
    ends = (task.columns.get(column) for column in (columns[0], columns[-1]))
    first, last = (None if end is None else end.value for end in ends)
    if not share or first is None or last is None:
        return words.change(first, last)
    return f"{100 * (last - first):+.1f} points"
