"""Scores of lm-eval's tasks: one metric of each task, a group's aggregate, the average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.evaluation.task_index import config_of
from prunekit.evaluation.task_loading import LoadedTask

# The papers give `acc_norm` for these tasks, `acc` for others.
NORMALISED = ("piqa", "hellaswag", "arc_challenge", "openbookqa")

# lm-eval's name of a metric and of its filter ("acc,none") → its value; and "sample_len".
Metrics = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The score of one task, of a group of tasks, or the average of tasks.

    Attributes:
        value: of the metric.
        metric: its name, such as "acc_norm".
        stderr: standard error of the value, where lm-eval gives one.
        samples: questions asked.
        fewshot: examples before each question; None where averaged tasks differ in it.
        group: the group that the task was run as a member of.
    """

    value: float
    metric: str
    stderr: float | None
    samples: int
    fewshot: int | None
    group: str | None = None

    def describe(self) -> dict[str, Any]:
        """The fields of the report that are the same for all models that answer the task."""
        about = {"metric": self.metric, "samples": self.samples, "fewshot": self.fewshot}
        return about | ({"of": self.group} if self.group else {})

    def to_json(self) -> dict[str, Any]:
        """The score as JSON has it."""
        return {"value": self.value, "stderr": self.stderr, **self.describe()}


def score_tasks(
    loaded: Sequence[LoadedTask], results: Mapping[str, Metrics]
) -> dict[str, TaskScore]:
    """Scores of groups, each before those of its members, and of tasks; then their average.

    The average is over groups and tasks without a group, where all have accuracies.
    """
    scores: dict[str, TaskScore] = {}
    for one in loaded:
        name, group = one.member.name, one.member.group
        if group and group not in scores:
            own = [other for other in loaded if other.member.group == group]
            scores[group] = _score_group(group, own, results)
        metric = _choose_metric(name, results[name])
        scores[name] = _score(results[name], metric, one.shots, group)
    top = [score for score in scores.values() if score.group is None]
    if len(top) > 1 and {score.metric for score in top} <= {"acc", "acc_norm"}:
        scores["average"] = _average(top)
    return scores


def _average(scores: Sequence[TaskScore]) -> TaskScore:
    metrics = dict.fromkeys(score.metric for score in scores)
    fewshot = {score.fewshot for score in scores}
    return TaskScore(
        value=sum(score.value for score in scores) / len(scores),
        metric=f"mean of {' and '.join(metrics)}",
        stderr=None,
        samples=sum(score.samples for score in scores),
        fewshot=fewshot.pop() if len(fewshot) == 1 else None,
    )


def _score_group(
    name: str, members: Sequence[LoadedTask], results: Mapping[str, Metrics]
) -> TaskScore:
    """lm-eval's own aggregate over the members that ran."""
    from dataclasses import fields

    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    known = {field.name for field in fields(GroupConfig)}
    group = Group.from_config(
        {key: value for key, value in config_of(name).items() if key in known}
    )
    for one in members:
        group.add(one.task)
    own: Any = {one.member.name: results[one.member.name] for one in members}
    metrics: Any = group.aggregate(own)
    return _score(metrics, _metric_names(metrics)[0], members[0].shots)


def _metric_names(metrics: Metrics) -> list[str]:
    return [key for key in metrics if "," in key and "_stderr" not in key]


def _choose_metric(task: str, metrics: Metrics) -> str:
    """The metric that the papers give, else the first one with a name of its own."""
    wanted = "acc_norm" if task in NORMALISED else "acc"
    names = _metric_names(metrics)
    for name in names:
        if name.startswith(f"{wanted},"):
            return name
    return next((name for name in names if not name.startswith("score,")), names[0])


def _score(metrics: Metrics, name: str, fewshot: int, group: str | None = None) -> TaskScore:
    metric, variant = name.split(",", 1)
    stderr = metrics.get(f"{metric}_stderr,{variant}")
    return TaskScore(
        value=float(metrics[name]),
        metric=metric,
        stderr=None if stderr is None or isinstance(stderr, str) else float(stderr),
        samples=int(metrics["sample_len"]),
        fewshot=fewshot,
        group=group,
    )
