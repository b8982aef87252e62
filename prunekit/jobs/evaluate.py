"""`task=evaluate`: measure any model, and `eval.baseline` beside it."""

from __future__ import annotations

from prunekit.evaluation.evaluation import Evaluation
from prunekit.evaluation.measures import Measures
from prunekit.jobs.job import Job, Outcome
from prunekit.jobs.sources import Source
from prunekit.report import Report
from prunekit.runtime.processes import rank


def run_evaluate(job: Job) -> Outcome:
    """Measure the model of the job; where a baseline is given, measure the baseline first.

    Only one of the two is in memory at a time, where they are loaded from folders.
    """
    sources: dict[str, Source] = {"dense": job.baseline} if job.baseline is not None else {}
    sources["model"] = job.source
    columns: dict[str, Evaluation] = {}
    measures: Measures | None = None
    for name, source in sources.items():
        with job.stages("load"):
            subject = job.open(source, measures=measures)
            measures = subject.measures
        with job.stages(f"evaluate_{name}"):
            columns[name] = subject.evaluate_as_loaded()
        if name == "dense":
            del subject
    figures = Report(model=_describe(job))
    if rank():
        return Outcome(figures=figures)
    figures = figures.merge(Report.from_plain(subject.measures.compare(columns).to_json()))
    beside = {name: source for name, source in sources.items() if name != "model"}
    speed = job.measure_speed(subject.measures, columns, beside, {"model": subject.model})
    return Outcome(figures=figures.merge(speed))


def _describe(job: Job) -> str:
    """Name the model that is measured, for the report."""
    if job.inputs.model is not None:
        return f"a {type(job.inputs.model).__name__} in memory"
    return job.config.model.path or "the embedded model"
