"""`task=recover`: fine-tune the model of a pruned model's folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prunekit.errors import ConfigError, DataError
from prunekit.evaluation.evaluation import Evaluation
from prunekit.jobs.finetune import FineTuning
from prunekit.jobs.job import Finished, Job, Outcome, Subject
from prunekit.jobs.sources import Source, identity_of
from prunekit.jobs.updates import UPDATES, read_updates
from prunekit.model.updates import Factors
from prunekit.model.weights import cast_weights, check_finite
from prunekit.plan import PruningPlan
from prunekit.report import Report
from prunekit.runtime.processes import rank


def run_recover(job: Job) -> Outcome:
    """Fine-tune the model of the job; the report and the plan of its pruning go along."""
    recovery, stages = job.build_recovery(), job.stages
    if recovery is None:
        raise ConfigError("task=recover: expected recovery=lora or another, got none")
    with stages("load"):
        subject = job.open(job.source)
        training = FineTuning.prepare(job, recovery, subject, job.baseline)
    check_finite(subject.model)
    columns: dict[str, Evaluation] = {}
    if job.baseline is not None:
        with stages("evaluate_dense"):
            columns["dense"] = _evaluate_baseline(job, subject, job.baseline)
    with stages("evaluate_pruned"):
        columns["pruned"] = subject.evaluate()
    updates = job.inputs.updates
    if updates is None:
        updates = _read_updates(job.source)
    result, adapter = training.run({"model": identity_of(job.source)}, updates=updates)
    with stages("evaluate_recovered"):
        columns["recovered"] = subject.evaluate()
    if rank():
        return Outcome(figures=Report(), finished=_finish(subject, None, None))
    before = _read_report(job.source)
    measured = subject.measures.compare(columns).to_json()
    figures = before.merge(Report.from_plain({"recovery": result.to_json(), **measured}))
    beside = {"dense": job.baseline} if job.baseline is not None else {}
    speed = job.measure_speed(subject.measures, columns, beside, {"recovered": subject.model})
    plan = _read_plan(job.source) if len(before) else None
    return Outcome(figures=figures.merge(speed), finished=_finish(subject, plan, adapter))


def _evaluate_baseline(job: Job, subject: Subject, source: Source) -> Evaluation:
    """Measure the dense model as the pruned one is measured; it is in memory meanwhile only."""
    model, _ = job.load(source, subject.stored)
    dense = replace(subject, source=source, model=model, kept=job.kept_of(source))
    return dense.evaluate_as_loaded()


def _finish(subject: Subject, plan: PruningPlan | None, adapter: Path | None) -> Finished:
    cast_weights(subject.model, subject.stored)
    return Finished(model=subject.model, tokenizer=subject.preparation, plan=plan, adapter=adapter)


def _read_report(source: Source) -> Report:
    """The pruning part of the report of the run that a model came from; empty without a run."""
    if not isinstance(source, str | Path):
        return Report()
    folder = Path(source)
    if folder.name != "model" or not (folder / "prunekit.json").exists():
        return Report()
    try:
        text = (folder.parent / "report.json").read_text(encoding="utf-8")
        return Report.from_json(text).pruning_part()
    except (OSError, UnicodeDecodeError, DataError):
        return Report()


def _read_updates(source: Source) -> dict[str, Factors]:
    """What the run that a model came from has left to go on with; nothing without such a run."""
    path = Path(str(source)).parent / UPDATES
    return read_updates(path) if path.exists() else {}


def _read_plan(source: Source) -> PruningPlan | None:
    path = Path(str(source)).parent / "plan.json"
    return PruningPlan.load(path) if path.exists() else None
