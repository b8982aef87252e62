"""`task=tokens`: how much of each Hessian the largest calibration tokens own, and where."""

from __future__ import annotations

from prunekit.allocation.groups import choose_groups, refuse_vocabulary
from prunekit.calibration.concentration import measure_concentration
from prunekit.graph.example import trace_batch
from prunekit.jobs.calibration import describe_calibration, load_windows, warnings_of
from prunekit.jobs.job import Job, Outcome
from prunekit.jobs.prune import make_calibration
from prunekit.jobs.sources import base_of
from prunekit.report import Report
from prunekit.report.parts import LargeTokens


def run_tokens(job: Job) -> Outcome:
    """Run the dense model on the calibration set once; nothing is cut.

    Raises:
        ConfigError: the model has no group of the kinds that are asked for.
    """
    config = job.config
    refuse_vocabulary(config.groups)
    with job.stages("load"):
        subject = job.open(job.source)
        windows = load_windows(config, subject)
    batches = make_calibration(job, subject, windows)
    with job.stages("trace"):
        graph = trace_batch(subject.model, batches[0])
    groups = choose_groups(subject.model, graph, config.groups)
    with job.stages("tokens"):
        found = measure_concentration(subject.model, groups, batches)
    tokens = tuple(
        LargeTokens(
            group=name,
            permille=one.permille,
            percent=one.percent,
            positions={str(position): count for position, count in one.positions.items()},
        )
        for name, one in found.items()
    )
    figures = Report(
        large_tokens=tokens,
        base=base_of(config),
        calibration=describe_calibration(config, windows),
    )
    if warnings := warnings_of(config, windows):
        figures = figures.merge(Report(warnings=tuple(warnings)))
    return Outcome(figures=figures)
