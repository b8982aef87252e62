"""Run a task of the configuration, and write the folder of the run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prunekit.config import RunConfig, import_modules
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, trace
from prunekit.jobs.evaluate import run_evaluate
from prunekit.jobs.export import ExportSettings
from prunekit.jobs.finetune import TRAINING
from prunekit.jobs.folder import PARTIAL, clear_results, ensure_empty, write_run
from prunekit.jobs.job import GivenObjects, Job, Outcome
from prunekit.jobs.kept import Kept
from prunekit.jobs.prune import run_prune
from prunekit.jobs.recover import run_recover
from prunekit.jobs.search import run_search
from prunekit.jobs.sources import load_as_configured, source_of
from prunekit.jobs.tokens import run_tokens
from prunekit.model.inputs import input_device
from prunekit.model.weights import keep_types
from prunekit.pipeline import rehearse_cut
from prunekit.report import Report
from prunekit.report.couplings import write_couplings
from prunekit.runtime.devices import pick_device
from prunekit.runtime.modes import restoring
from prunekit.runtime.processes import process_group, rank
from prunekit.runtime.stages import Stages
from prunekit.runtime.versions import versions
from prunekit.schedules.folders import STATE

_JOBS: Mapping[str, Callable[[Job], Outcome]] = {
    "prune": run_prune,
    "evaluate": run_evaluate,
    "recover": run_recover,
    "search": run_search,
    "tokens": run_tokens,
}


@dataclass(frozen=True, kw_only=True)
class Completed:
    """The result of a job for a caller in Python: the report, and the new model if there is one."""

    report: Report
    model: PreTrainedModel | None


def run(
    config: RunConfig,
    output: Path,
    provenance: Mapping[str, str] | None = None,
    command: str | None = None,
    kept: Kept | None = None,
) -> Report:
    """Do `config.task` (one of `_JOBS`) and write the result; `run_job` says how."""
    return run_job(config, output, provenance, command, kept=kept).report


def run_job(
    config: RunConfig,
    output: Path | None,
    provenance: Mapping[str, str] | None = None,
    command: str | None = None,
    inputs: GivenObjects | None = None,
    kept: Kept | None = None,
) -> Completed:
    """Do `config.task` (prune, evaluate, recover, search or tokens) and write the result.

    Args:
        config: what to do.
        output: a new or empty folder; None: nothing is written.
        provenance: file name → text, kept in `.hydra/`: what repeats the run.
        command: the same in one line, for the report.
        inputs: a model, a tokenizer and backends that the caller holds as objects.
        kept: what the runs of a sweep have in common.

    Raises:
        PrunekitError: anything wrong with the request; `output` then holds no result.
    """
    inputs = inputs or GivenObjects()
    import_modules(config.imports)
    export = ExportSettings.build(config.export)
    if export.wanted and config.task in ("evaluate", "search", "tokens"):
        raise ConfigError(
            f"task={config.task}: writes no model that could be exported; expected task=export, or "
            "export=none"
        )
    source = source_of(config) if inputs.model is None else inputs.model
    device = pick_device(config.device) if inputs.model is None else input_device(inputs.model)
    with process_group(device), _using(inputs, config.seed, device), _open_folder(output) as folder:
        if not rank():  # the first process evaluates and writes
            if config.resume and any((folder / name).exists() for name in (STATE, TRAINING)):
                clear_results(folder)  # half written by a run that was killed
            ensure_empty(folder, besides={STATE, PARTIAL, TRAINING})
        job = Job(
            config=config,
            source=source,
            output=folder,
            stages=Stages(device),
            export=export,
            inputs=inputs,
            kept=kept,
        )
        outcome = _JOBS[config.task](job)
        report = outcome.figures if rank() else _assemble(job, outcome, command)
        if output is not None and not rank():
            _write(job, outcome, report, provenance or {})
        model = None if outcome.finished is None else outcome.finished.model
        return Completed(report=report, model=model)


@contextmanager
def _open_folder(output: Path | None) -> Iterator[Path]:
    """The folder that a job works in: the output, or a temporary one where nothing is written."""
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="prunekit-") as folder:
        yield Path(folder)


def _assemble(job: Job, outcome: Outcome, command: str | None) -> Report:
    """The report of a run."""
    about = Report(task=job.config.task, seed=job.config.seed, command=command, versions=versions())
    clock = Report(seconds=job.stages.seconds, peak_memory_bytes=job.stages.peak_memory_bytes)
    return about.merge(outcome.figures).merge(clock)


def _write(job: Job, outcome: Outcome, report: Report, provenance: Mapping[str, str]) -> None:
    """Write the folder of the run, remove the state that a resumed run would need, export."""
    with job.stages("save"):
        write_run(job.output, report, provenance, outcome.finished, job.export.remote_code)
    for left in (STATE, PARTIAL, TRAINING):
        shutil.rmtree(job.output / left, ignore_errors=True)
    if outcome.finished is not None:
        job.export.finish(job.output)


@contextmanager
def _using(inputs: GivenObjects, seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers for a `with` block.

    Afterwards the caller's random numbers go on, and the models in memory have their types again.
    """
    models = [model for model in (inputs.model, inputs.baseline) if model is not None]
    devices = [device] if device.type == "cuda" else []
    with restoring(*map(keep_types, models)), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def run_trace(config: RunConfig, output: Path) -> CouplingGraph:
    """`task=trace`: the model's coupled groups.

    `graph.graphml` and `layer.svg` are left in the output folder.
    """
    import_modules(config.imports)
    ensure_empty(output)
    model = load_as_configured(source_of(config), config.model)
    embeddings: Any = model.get_input_embeddings()
    ids = torch.randint(
        embeddings.num_embeddings, (2, 8), generator=torch.Generator().manual_seed(config.seed)
    )
    graph = trace(model, {"input_ids": ids})
    with suppress(ConfigError):  # none of the groups can be cut, as the table says then
        graph = rehearse_cut(model, graph, config, None, saved=True)
    write_couplings(graph, output)
    return graph
