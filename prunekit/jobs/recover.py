"""`task=recover`: fine-tune a pruned model's folder; and the same as a part of `task=prune`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunekit.config import build, flat
from prunekit.errors import CheckpointError, ConfigError
from prunekit.evaluation.evaluation import Evaluation
from prunekit.evaluation.measures import Measures
from prunekit.graph import CouplingGraph, trace
from prunekit.jobs.export import Export
from prunekit.jobs.job import Finished, Job, identity_of, source_of, speeds
from prunekit.model.weights import cast_weights, check_finite, round_weights
from prunekit.plan import PruningPlan
from prunekit.recovery import Recovery, RecoveryResult, prepare, recover
from prunekit.recovery.data import Data
from prunekit.runtime.files import write_text
from prunekit.runtime.processes import add_up, rank, together

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING = ".training"  # what an unfinished recovery leaves in its output folder


def run_recover(job: Job) -> tuple[dict[str, Any], Finished]:
    """`task=recover`: fine-tune a pruned model's folder; what its report and plan said goes along."""
    config, stages = job.config, job.stages
    recovery: Recovery | None = build(config.recovery, "recovery")
    if recovery is None:
        raise ConfigError("task=recover: expected recovery=lora or another, got none")
    source = source_of(config)
    with stages("load"):
        model, stored = job.load(source)
        Export.of(config.export).check(model)
        tokenizer = job.tokenizer(source)
        measures = job.measures(tokenizer, model, stored)
        data = prepared(job, recovery, measures, model, config.eval.baseline)
    check_finite(model)
    columns: dict[str, Evaluation] = {}
    if config.eval.baseline:
        with stages("evaluate_dense"):
            columns["dense"] = measures.of(job.load(config.eval.baseline, stored)[0])
    with stages("evaluate_pruned"):
        columns["pruned"] = measures.of(model)
    facts = {"model": identity_of(source)}
    found, adapter = recovered(
        job, recovery, data, model, stored, measures, facts, config.eval.baseline
    )
    with stages("evaluate_recovered"):
        columns["recovered"] = measures.of(model)
    if rank():
        return {}, Finished(model=model, tokenizer=tokenizer, plan=None)
    report = {
        **_before(Path(source)),
        "recovery": found.to_json(),
        **measures.compare(columns).to_json(),
    }
    others = {"dense": config.eval.baseline} if config.eval.baseline else {}
    report |= speeds(job, measures, columns, others, {"recovered": model})
    cast_weights(model, stored)
    path = Path(source).parent / "plan.json"
    plan = PruningPlan.load(path) if _before(Path(source)) and path.exists() else None
    return report, Finished(model=model, tokenizer=tokenizer, plan=plan, adapter=adapter)


def _before(folder: Path) -> dict[str, Any]:
    """Of the report of the run that a model folder came from: what still holds."""
    if folder.name != "model" or not (folder / "prunekit.json").exists():
        return {}
    try:
        report = json.loads((folder.parent / "report.json").read_text(encoding="utf-8"))
        return {
            key: report[key]
            for key in ("base", "method", "ratio", "target", "policy", "layers", "calibration")
            if key in report
        }
    except (OSError, ValueError):
        return {}


def prepared(
    job: Job,
    recovery: Recovery | None,
    measures: Measures,
    model: nn.Module,
    dense: str | Path | None,
) -> Any:
    """What a recovery will be trained on; its mistakes are found before anything long begins."""
    if recovery is None:
        return None
    if recovery.needs_teacher and dense is None:
        raise ConfigError(
            "recovery=distill: expected the dense model, its teacher, as eval.baseline, got none"
        )
    known, seed = job.config.corpora, job.config.seed
    return prepare(
        model, measures.tokenizer, recovery, known=known, seed=seed, watch=measures.windows
    )


def recovered(
    job: Job,
    recovery: Recovery,
    data: Data,
    model: PreTrainedModel,
    stored: torch.dtype,
    measures: Measures,
    facts: Mapping[str, Any],
    dense: str | Path | None,
    graph: CouplingGraph | None = None,
) -> tuple[RecoveryResult, Path | None]:
    """Fine-tune the model in place; what came of it, and the adapter's folder where it was not
    merged.
    """
    config, folder = job.config, job.output / TRAINING
    facts = {
        **facts,
        "data": data.fingerprint,
        **flat({"recovery": config.recovery, "seed": config.seed}),
    }
    facts |= {"teacher": identity_of(dense)} if recovery.needs_teacher and dense else {}
    _claim(folder, facts, config.resume)
    teacher = None
    if recovery.needs_teacher:
        assert dense is not None
        teacher = job.load(dense, stored)[0]
    modules = None
    if "all" not in recovery.kinds:
        graph = graph or trace(
            model, {"input_ids": torch.ones(2, 8, dtype=torch.long), "use_cache": False}
        )
        modules = modules_by_kind(model, graph)
    with job.stages("recover"):
        found = recover(
            model,
            measures.tokenizer,
            recovery,
            known=config.corpora,
            seed=config.seed,
            folder=folder,
            teacher=teacher,
            watch={name: partial(_perplexity, measures, name) for name in measures.windows},
            modules=modules,
            resume=config.resume,
            base=str(job.output / "model"),
            data=data,
        )
    if recovery.merge:
        round_weights(model, stored)
    return found, None if recovery.merge else folder / "adapter"


def _perplexity(measures: Measures, name: str, model: nn.Module) -> float:
    """Measured by the first process: all must stop at the same step."""
    with together():
        value = 0.0 if rank() else measures.perplexity(model, name)
    return add_up(torch.tensor(value, dtype=torch.float64, device=measures.device)).item()


def modules_by_kind(model: nn.Module, graph: CouplingGraph) -> dict[str, set[str]]:
    """A group's kind → the modules that hold its units; to attention belongs what lies beside them
    (a lone KV head).
    """
    found: dict[str, set[str]] = {"attention": set(), "mlp": set()}
    for group in graph.groups:
        found.setdefault(group.kind, set()).update(
            m.parameter.rpartition(".")[0] for m in group.members
        )
    homes = {name.rpartition(".")[0] for name in found["attention"]}
    beside = {name for name, _ in model.named_modules() if name.rpartition(".")[0] in homes}
    return found | {"attention": found["attention"] | beside - found["mlp"]}


def _claim(folder: Path, facts: Mapping[str, Any], resume: bool) -> None:
    """Make the folder of a recovery; one that is there is gone on with, if asked for and of the
    same facts.
    """
    path, facts = folder / "facts.json", json.loads(json.dumps(facts))
    with together():
        if rank():
            return
        if path.exists() and any(folder.glob("checkpoints/*")):
            if not resume:
                raise CheckpointError(
                    f"{folder}: holds an unfinished recovery: resume=true goes on with it"
                )
            before = json.loads(path.read_text(encoding="utf-8"))
            for key in sorted({*before, *facts}):
                if before.get(key) != facts.get(key):
                    made, now = before.get(key), facts.get(key)
                    raise CheckpointError(
                        f"resume: {folder} was made with {key}={made}, this run has {now}; remove it"
                    )
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(facts))
