"""`task=prune`: measure, prune, measure, and where asked for recover, measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from prunekit.config import VOCABULARY, RunConfig, kinds_of
from prunekit.data.batches import Batch, make_batches
from prunekit.data.images import place
from prunekit.data.windows import Windows
from prunekit.evaluation.cost import measure_size
from prunekit.evaluation.evaluation import Evaluation
from prunekit.graph import CouplingGraph
from prunekit.jobs.calibration import (
    Drawn,
    describe_calibration,
    load_windows,
    rows_of_batch,
    warnings_of,
)
from prunekit.jobs.finetune import FineTuning
from prunekit.jobs.job import Finished, Job, Outcome, Subject
from prunekit.jobs.sources import base_of, identity_of
from prunekit.jobs.streaming import open_streamed_source
from prunekit.jobs.vocabulary import Reduction, other_groups, refuse_teacher
from prunekit.model.updates import Factors
from prunekit.model.weights import cast_weights, check_finite, round_weights
from prunekit.pipeline import Result, prune_model, trace_model
from prunekit.plan import PruningPlan
from prunekit.recovery import Recovery
from prunekit.report import Report
from prunekit.runtime.console import say
from prunekit.runtime.files import digest
from prunekit.runtime.processes import rank
from prunekit.schedules.folders import STATE, Folders, activations_folder
from prunekit.schedules.method import Method


def run_prune(job: Job) -> Outcome:
    """Measure, prune, measure; where asked for recover, measure."""
    method, recovery = Method.build(job.config, job.inputs.backends), job.build_recovery()
    with job.stages("load"):
        opened = job.open(job.source, open_streamed_source(job, method, recovery))
        _check_ranks(method, recovery)
        reduction, subject = _plan_reduction(job, opened, recovery)
        windows = load_windows(job.config, subject) if other_groups(job.config) else None
        training = recovery and FineTuning.prepare(job, recovery, subject, job.source)
    if subject.streamed is None:
        check_finite(subject.model)
    say(_announce(job.config, method, subject, windows))
    graph = _trace(job, method, subject, windows, reduction)
    columns: dict[str, Evaluation] = {}
    with job.stages("evaluate_dense"):
        columns["dense"] = opened.evaluate_as_loaded()
    cut = _cut(job, method, subject, windows, reduction, graph)
    columns["dense"] = cut.comparable(columns["dense"])
    with job.stages("evaluate_pruned"):
        columns["pruned"] = subject.evaluate()
    figures, adapter = cut.figures, None
    if training:
        facts = {"model": identity_of(job.source), "plan": digest([cut.plan.to_json()])}
        recovered, adapter = training.run(facts, cut.graph, cut.updates)
        figures = figures.merge(Report.from_plain({"recovery": recovered.to_json()}))
        with job.stages("evaluate_recovered"):
            columns["recovered"] = subject.evaluate()
    if not rank():
        figures = figures.merge(_compare(job, subject, columns))
    if cut.warnings:
        figures = figures.merge(Report(warnings=(*cut.warnings, *(figures.warnings or ()))))
    finished = Finished(
        model=subject.model,
        tokenizer=subject.preparation,
        plan=cut.plan if cut.graph else None,
        streamed=subject.streamed,
        adapter=adapter,
        updates={} if training else cut.updates,
    )
    return Outcome(figures=figures, finished=finished)


def _check_ranks(method: Method, recovery: Recovery | None) -> None:
    """Raise ConfigError where the recovery's adapters can't hold updates that they go on with."""
    importance = method.importance.at_once
    if recovery and importance:
        recovery.check_rank(importance.kept_rank)


def _plan_reduction(
    job: Job, subject: Subject, recovery: Recovery | None
) -> tuple[Reduction | None, Subject]:
    """The tokens that go, if any are to, and the model with the tokenizer that it will have."""
    if VOCABULARY not in kinds_of(job.config.groups):
        return None, subject
    refuse_teacher(recovery)
    reduction = Reduction.plan(job, subject)
    return reduction, reduction.subject


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cut:
    """What was cut from the model of a job.

    Attributes:
        plan: the units that are gone; none where tokens alone went.
        graph: the groups before the cut; None where tokens alone went.
        figures: the report of the cut.
        warnings: what a reader should know, in whole sentences.
        reduction: the tokens that went, if any.
        updates: what was learned beside gates, for a recovery to go on with.
    """

    plan: PruningPlan
    graph: CouplingGraph | None
    figures: Report
    warnings: tuple[str, ...]
    reduction: Reduction | None
    updates: Mapping[str, Factors]

    def comparable(self, dense: Evaluation) -> Evaluation:
        """The dense model's figures, without those that have no counterpart in the cut model."""
        if self.graph:
            removed = self.plan.removed
            gone = {u for stack in self.graph.stacks for u in removed.get(stack.name, ())}
            dense = dense.without_layers(gone)
        return self.reduction.comparable(dense) if self.reduction else dense


def _cut(
    job: Job,
    method: Method,
    subject: Subject,
    windows: Drawn | None,
    reduction: Reduction | None,
    graph: CouplingGraph | None,
) -> _Cut:
    """Remove tokens, then units, where either is asked for."""
    figures, warnings = Report(base=base_of(job.config)), list[str]()
    plan, updates = PruningPlan({}), dict[str, Factors]()
    if reduction:
        with job.stages("vocabulary"):
            reduction.cut()
        figures = figures.merge(Report(vocabulary=reduction.figures))
        warnings += reduction.warnings()
    if windows is not None:
        result = _prune(job, method, subject, windows, graph)
        plan, graph, updates = result.plan, result.graph, dict(result.updates)
        calibration = describe_calibration(job.config, windows)
        figures = result.report.merge(figures).merge(Report(calibration=calibration))
        warnings += warnings_of(job.config, windows)
    return _Cut(
        plan=plan,
        graph=graph,
        figures=figures,
        warnings=tuple(warnings),
        reduction=reduction,
        updates=updates,
    )


def folders_of(job: Job) -> Folders:
    """The folders of a job that prunes."""
    return Folders(
        state=job.output / STATE,
        activations=activations_folder(job.config, job.output),
        model=job.output / "model",
        identity=identity_of(job.source),
        undo=False,
        keep=True,
        saves=True,
    )


def make_calibration(job: Job, subject: Subject, windows: Drawn) -> list[Batch]:
    """The batches of the calibration windows, or of the samples with images."""
    device, rows = job.stages.device, rows_of_batch(job.config)
    if isinstance(windows, Windows):
        return make_batches(subject.model, windows.ids, rows, device)
    return make_batches(
        subject.model, place(windows.batches, device, subject.model.dtype), rows, device
    )


def _trace(
    job: Job,
    method: Method,
    subject: Subject,
    windows: Drawn | None,
    reduction: Reduction | None,
) -> CouplingGraph | None:
    """Trace the model before any work, to tell what can't be cut; not where tokens go first."""
    if windows is None or reduction is not None:
        return None
    return trace_model(
        subject.model,
        replace(job.config, groups=other_groups(job.config)),
        method,
        make_calibration(job, subject, windows),
        job.stages,
        folders=folders_of(job),
        streamed=subject.streamed,
    )


def _prune(
    job: Job, method: Method, subject: Subject, windows: Drawn, graph: CouplingGraph | None
) -> Result[PreTrainedModel]:
    """Prune the model on the windows, and round its weights to the type that is saved."""
    result = prune_model(
        subject.model,
        replace(job.config, groups=other_groups(job.config)),
        method,
        make_calibration(job, subject, windows),
        job.stages,
        stored=subject.stored,
        folders=folders_of(job),
        streamed=subject.streamed,
        graph=graph,
    )
    if subject.streamed is None:
        round_weights(subject.model, subject.stored)
    return result


def _compare(job: Job, subject: Subject, columns: dict[str, Evaluation]) -> Report:
    """The measured part of the report; afterwards the weights have the type that is saved."""
    figures = Report.from_plain(subject.measures.compare(columns).to_json())
    if subject.streamed is None:
        last = list(columns)[-1]
        beside = {"dense": job.source}
        speed = job.measure_speed(subject.measures, columns, beside, {last: subject.model})
        figures = figures.merge(speed)
        cast_weights(subject.model, subject.stored)
    return figures


def _announce(config: RunConfig, method: Method, subject: Subject, windows: Drawn | None) -> str:
    """Describe the pruning that is about to begin, in one line."""
    name = config.model.path or "the embedded model"
    parts = [f"{name}: {measure_size(subject.model, subject.stored).parameters:,} parameters"]
    if VOCABULARY in kinds_of(config.groups):
        parts.append("tokens that texts don't need go")
    if windows is not None:
        parts.append(f"{config.method_name}, {_describe_aim(config, method)}")
        parts.append(f"calibration on {windows.origin}")
    return "; ".join(parts)


def _describe_aim(config: RunConfig, method: Method) -> str:
    """The target in words."""
    measure = method.cost.name
    if shape := config.target_shape.given:
        return f"down to {', '.join(f'{number} {name}' for name, number in shape.items())}"
    for limit in config.target.given.values():
        return f"down to {limit:,g} {measure}"
    counted = "of them" if measure == "parameters" else f"of its {measure}"
    return f"{config.ratio:.0%} {counted} to go"
