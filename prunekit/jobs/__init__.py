"""The command line's jobs: from a model's name to a finished folder; they alone know all stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prunekit.checkpoint import from_pretrained
from prunekit.config import RunConfig
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, trace
from prunekit.jobs.diff import run_diff
from prunekit.jobs.evaluate import run_evaluate
from prunekit.jobs.export import Export, run_export
from prunekit.jobs.folder import PARTIAL, clear_results, ensure_empty, write_run
from prunekit.jobs.job import Finished, Job, source_of
from prunekit.jobs.prune import run_prune
from prunekit.jobs.recover import TRAINING, run_recover
from prunekit.report import Report
from prunekit.report.couplings import write_couplings
from prunekit.runtime.devices import pick_device
from prunekit.runtime.processes import process_group, rank
from prunekit.runtime.stages import Stages
from prunekit.runtime.versions import versions
from prunekit.schedules.places import STATE

__all__ = ["run", "run_diff", "run_export", "run_trace"]

_JOBS: dict[str, Callable[[Job], tuple[dict[str, Any], Finished | None]]] = {
    "prune": run_prune,
    "evaluate": run_evaluate,
    "recover": run_recover,
}


def run(
    config: RunConfig,
    output: Path,
    provenance: Mapping[str, str] | None = None,
    command: str | None = None,
) -> Report:
    """Do `config.task` (prune, evaluate or recover) and write the result.

    Args:
        config: what to do.
        output: a new or empty folder.
        provenance: file name → text, kept in `.hydra/`: what repeats the run.
        command: the same in one line, for the report.

    Returns:
        The report.

    Raises:
        PrunekitError: whatever was wrong with the request; `output` then holds no result.
    """
    device, export = pick_device(config.device), Export.of(config.export)
    if export.wanted and config.task == "evaluate":
        raise ConfigError(
            "task=evaluate: writes no model that could be exported; expected task=export, or export=none"
        )
    with process_group(device):
        if not rank():  # which evaluates and writes
            if config.resume and any((output / name).exists() for name in (STATE, TRAINING)):
                clear_results(output)  # of a run that was killed while it wrote them
            ensure_empty(output, besides={STATE, PARTIAL, TRAINING})
        torch.manual_seed(config.seed)
        stages = Stages(device)
        figures, result = _JOBS[config.task](Job(config=config, output=output, stages=stages))
        if rank():
            return Report.from_plain(figures)
        with stages("save"):
            about = {
                "task": config.task,
                "seed": config.seed,
                "command": command,
                "versions": versions(),
            }
            measured = {"seconds": stages.seconds, "peak_memory_bytes": stages.peak_memory_bytes}
            report = Report.from_plain(about | figures | measured)
            write_run(output, report, provenance or {}, result, export.remote_code)
        for left in (STATE, PARTIAL, TRAINING):
            shutil.rmtree(output / left, ignore_errors=True)
        if result is not None:
            export.finish(output)
        return report


def run_trace(config: RunConfig, output: Path) -> CouplingGraph:
    """`task=trace`: the model's coupled groups, with `graph.graphml` and `layer.svg` in the output
    folder.
    """
    ensure_empty(output)
    model = from_pretrained(source_of(config), trust_remote_code=config.model.trust_remote_code)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, 8), generator=torch.Generator().manual_seed(config.seed))
    graph = trace(model, {"input_ids": ids})
    write_couplings(graph, output)
    return graph
