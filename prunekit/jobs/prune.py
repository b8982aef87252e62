"""`task=prune`: measure, prune, measure, and where asked for recover, measure."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.config import RunConfig, build
from prunekit.data.batches import make_batches
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import calibration_windows
from prunekit.evaluation.cost import measure_size
from prunekit.evaluation.evaluation import Evaluation
from prunekit.jobs.export import Export
from prunekit.jobs.job import (
    Finished,
    Job,
    base_of,
    content_of,
    identity_of,
    source_of,
    speeds,
)
from prunekit.jobs.recover import prepared, recovered
from prunekit.jobs.streaming import stream
from prunekit.model.inputs import check_length
from prunekit.model.weights import cast_weights, check_finite, round_weights
from prunekit.pipeline import prune_model
from prunekit.recovery import Recovery
from prunekit.runtime.console import say
from prunekit.runtime.devices import pick_dtype
from prunekit.runtime.files import digest
from prunekit.runtime.processes import rank, world_size
from prunekit.schedules.method import Method
from prunekit.schedules.places import STATE, Places, activations_folder


def run_prune(job: Job) -> tuple[dict[str, Any], Finished]:
    """`task=prune`: measure, prune, measure, and where asked for recover, measure."""
    config, stages, device, source = (
        job.config,
        job.stages,
        job.stages.device,
        source_of(job.config),
    )
    method = Method.build(config)
    recovery: Recovery | None = build(config.recovery, "recovery")
    with stages("load"):
        if streamed := stream(config, method, source, device, pick_dtype(config.dtype)):
            model, stored = streamed.model, streamed.stored
        else:
            model, stored = job.load(source)
        Export.of(config.export).check(model)
        tokenizer = job.tokenizer(source)
        text = config.data.calibration
        check_length("data.calibration.sequence_length", text.sequence_length, model)
        documents = load_corpus(text.path or text.corpus, "calibration", config.corpora)
        windows = calibration_windows(
            documents, tokenizer, text.samples, text.sequence_length, text.seed
        )
        measures = job.measures(tokenizer, model, stored)
        data = prepared(job, recovery, measures, model, source)
    if streamed is None:
        check_finite(model)
    dense = measure_size(model, stored)
    say(
        f"{config.model.path or 'the embedded model'}: {dense.parameters:,} parameters; {config.method_name}, "
        f"{aim(config, method)}; {windows.numel():,} calibration tokens"
    )
    columns: dict[str, Evaluation] = {}
    with stages("evaluate_dense"), streamed.evaluated() if streamed else nullcontext():
        columns["dense"] = measures.of(model, key=partial(content_of, source) if streamed else None)
    places = Places(
        state=job.output / STATE,
        activations=activations_folder(config, job.output),
        model=job.output / "model",
        identity=identity_of(source),
        undo=False,
        keep=True,
    )
    # So small that every process gets one.
    batch_size = min(text.batch_size, -(-len(windows) // world_size()))
    batches = make_batches(model, windows, batch_size, device)
    result = prune_model(
        model, config, method, batches, stages, stored=stored, places=places, streamed=streamed
    )
    report, adapter = (
        dict(result.report) | {"base": base_of(config), "calibration": calibration(config)},
        None,
    )
    if streamed is None:
        round_weights(model, stored)
    dropped = {u for g in result.graph.stacks for u in result.plan.removed.get(g.name, ())}
    columns["dense"] = columns["dense"].without_layers(dropped)
    with stages("evaluate_pruned"), streamed.evaluated() if streamed else nullcontext():
        columns["pruned"] = measures.of(model, key=(lambda: None) if streamed else None)
    if recovery is not None:
        facts = {"model": identity_of(source), "plan": digest([result.plan.to_json()])}
        found, adapter = recovered(
            job, recovery, data, model, stored, measures, facts, source, result.graph
        )
        report["recovery"] = found.to_json()
        with stages("evaluate_recovered"):
            columns["recovered"] = measures.of(model)
    if rank():
        return report, Finished(model=model, tokenizer=tokenizer, plan=result.plan)
    report |= measures.compare(columns).to_json()
    if streamed is None:
        report |= speeds(job, measures, columns, {"dense": source}, {list(columns)[-1]: model})
        cast_weights(model, stored)
    return report, Finished(
        model=model, tokenizer=tokenizer, plan=result.plan, streamed=streamed, adapter=adapter
    )


def calibration(config: RunConfig) -> dict[str, Any]:
    """Which text the units were chosen by, how much of it."""
    text = config.data.calibration
    name = Path(text.path).name if text.path else text.corpus
    return {"corpus": name} | {
        key: getattr(text, key) for key in ("samples", "sequence_length", "seed")
    }


def aim(config: RunConfig, method: Method) -> str:
    """The target in words."""
    measure = method.cost.name
    for limit in config.target.given.values():
        return f"down to {limit:,g} {measure}"
    counted = "of them" if measure == "parameters" else f"of its {measure}"
    return f"{config.ratio:.0%} {counted} to go"
