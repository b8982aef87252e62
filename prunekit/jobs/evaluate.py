"""`task=evaluate`: any model, and `eval.baseline` beside it."""

from __future__ import annotations

from typing import Any

from prunekit.evaluation.evaluation import Evaluation
from prunekit.evaluation.measures import Measures
from prunekit.jobs.job import Job, source_of, speeds
from prunekit.runtime.processes import rank


def run_evaluate(job: Job) -> tuple[dict[str, Any], None]:
    """`task=evaluate`: any model, and `eval.baseline` beside it."""
    config, stages = job.config, job.stages
    sources = {
        **({"dense": config.eval.baseline} if config.eval.baseline else {}),
        "model": source_of(config),
    }
    report: dict[str, Any] = {"model": str(config.model.path or "the embedded model")}
    measures: Measures | None = None
    model: Any = None
    columns: dict[str, Evaluation] = {}
    for name, source in sources.items():
        del model  # one at a time
        with stages("load"):
            model, stored = job.load(source)
            measures = measures or job.measures(job.tokenizer(source), model, stored)
        with stages(f"evaluate_{name}"):
            columns[name] = measures.of(model)
    assert measures is not None
    if rank():
        return report, None
    report |= measures.compare(columns).to_json()
    others = {name: source for name, source in sources.items() if name != "model"}
    return report | speeds(job, measures, columns, others, {"model": model}), None
