"""What a report says of lm-eval's results: one metric of each task, a group's aggregate, the
average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunekit.evaluation.task_data import Member, config_of

NORMALISED = ("piqa", "hellaswag", "arc_challenge", "openbookqa")  # acc_norm, as the papers do


def rows_of(
    loaded: Sequence[tuple[Member, Any]], results: Mapping[str, Any]
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
    group = Group.from_config(
        {key: value for key, value in config_of(name).items() if key in known}
    )
    for task in tasks:
        group.add(task)
    found: Any = group.aggregate({task.task_name: results[task.task_name] for task in tasks})
    metric = next(key for key in found if "," in key and "_stderr" not in key)
    return _row(found, metric, tasks[0].config.num_fewshot)


def _main_metric(name: str, found: Mapping[str, Any]) -> str:
    """The metric that papers give: `acc_norm` for some tasks, else `acc`, else the first that says
    what it is.
    """
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
