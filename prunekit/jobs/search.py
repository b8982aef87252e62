"""`task=search`: settle the shares of all groups, as pruning would, and cut nothing."""

from __future__ import annotations

from prunekit.allocation.groups import refuse_vocabulary
from prunekit.errors import ConfigError
from prunekit.jobs.calibration import describe_calibration, load_windows, warnings_of
from prunekit.jobs.job import Job, Outcome
from prunekit.jobs.prune import folders_of, make_calibration
from prunekit.jobs.sources import base_of
from prunekit.pipeline import (
    allocate,
    describe_policy,
    gather_tools,
    list_left_out,
    rehearse_cut,
    trace_sound,
)
from prunekit.report import Report
from prunekit.report.pruning import count_units
from prunekit.schedules.method import Method


def run_search(job: Job) -> Outcome:
    """Let the policy settle the shares; `shares.csv` is what `policy=manual` takes.

    Raises:
        ConfigError: groups that compete, so that shares don't settle how much each loses.
    """
    config = job.config
    refuse_vocabulary(config.groups)
    method = Method.build(config, job.inputs.backends)
    if method.scope.ranking != "local":
        raise ConfigError(
            f"task=search: expected scope=local, got scope.ranking={method.scope.ranking}, where "
            "scores settle how much each group loses"
        )
    with job.stages("load"):
        subject = job.open(job.source)
        windows = load_windows(config, subject)
    batches = make_calibration(job, subject, windows)
    with job.stages("trace"):
        graph = trace_sound(subject.model, batches[0])
        graph = rehearse_cut(subject.model, graph, config, method, saved=True, batch=batches[0])
    with job.stages("search"):
        folders = folders_of(job)
        state = folders.open_state(config, graph, batches)
        tools = gather_tools(config, folders, state, job.stages.device)
        allocation = allocate(subject.model, graph, config, method, batches, subject.stored, tools)
    counts = allocation.assignment.budget.solve()
    removed = {name: range(count) for name, count in counts.items()}
    figures = Report(
        method=config.method_name,
        policy=describe_policy(allocation),
        layers=count_units(allocation.groups, removed),
        left_out=list_left_out(subject.model, graph, config, method.scope) or None,
        base=base_of(config),
        calibration=describe_calibration(config, windows),
    )
    if warnings := warnings_of(config, windows):
        figures = figures.merge(Report(warnings=tuple(warnings)))
    return Outcome(figures=figures)
