"""The command line's jobs: from a model's name to a finished folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint import from_pretrained, load_tokenizer, save_pretrained
from prunekit.checkpoint.manifest import checksum
from prunekit.checkpoint.save import write_text
from prunekit.compensation.store import free_bytes
from prunekit.config import RunConfig, build, flat
from prunekit.console import say
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import batches as token_batches
from prunekit.data.tokens import calibration_windows
from prunekit.errors import CheckpointError, ConfigError, PrunekitError
from prunekit.evaluation.cache import digest
from prunekit.evaluation.cost import size
from prunekit.graph import CouplingGraph, trace
from prunekit.live import check_length
from prunekit.machine import Stages, pick_device, pick_dtype
from prunekit.measure import Measures
from prunekit.parallel import add_up, process_group, rank, together, world_size
from prunekit.pipeline import DEMO_MODEL, STATE, Places, activations_folder, check_finite, prune_model, versions
from prunekit.plan import PruningPlan
from prunekit.recovery import Recovery, detach, prepare, recover
from prunekit.report import render_html, render_markdown, to_json, write_pictures
from prunekit.report.couplings import write_couplings
from prunekit.streaming import Streamed, stream

PARTIAL = ".model.partial"  # a streamed model's layers until it is finished
TRAINING = ".training"  # what an unfinished recovery leaves in its output folder
_SHARE = 0.6  # of the free memory that a second model may take


def run(
    config: RunConfig, output: Path, provenance: Mapping[str, str] | None = None, command: str | None = None
) -> dict[str, Any]:
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
    device = pick_device(config.device)
    with process_group(device):
        if not rank():  # which evaluates and writes
            if config.resume and any((output / name).exists() for name in (STATE, TRAINING)):
                clear_results(output)  # of a run that was killed while it wrote them
            ensure_empty(output, besides={STATE, PARTIAL, TRAINING})
        torch.manual_seed(config.seed)
        stages = Stages(device)
        report, result = _JOBS[config.task](Job(config=config, output=output, stages=stages))
        if rank():
            return report
        with stages("save"):
            about = {"task": config.task, "seed": config.seed, "command": command, "versions": versions()}
            measured = {"seconds": stages.seconds, "peak_memory_bytes": stages.peak_memory_bytes}
            report = about | report | measured
            write_run(output, report, provenance or {}, result)
        for left in (STATE, PARTIAL, TRAINING):
            shutil.rmtree(output / left, ignore_errors=True)
        return report


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to do, the folder its result goes to, the device and its clock."""

    config: RunConfig
    output: Path
    stages: Stages

    def load(self, source: str | Path, stored: torch.dtype | None = None) -> tuple[Any, torch.dtype]:
        """The model, ready to compute, and the type it will be stored in (`load`)."""
        trust = self.config.model.trust_remote_code
        return load(source, self.stages.device, stored or pick_dtype(self.config.dtype), trust)

    def tokenizer(self, source: str | Path) -> Any:
        """The model's."""
        return load_tokenizer(source, self.config.model.trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a job leaves beside its report: a model (written already where it was streamed), its plan, an adapter."""

    model: Any
    tokenizer: Any
    plan: PruningPlan | None
    streamed: Streamed | None = None
    adapter: Path | None = None

    def write(self, output: Path) -> None:
        """The model's folder, the plan, the adapter."""
        if self.adapter is not None:
            detach(self.model)
        if self.streamed is not None and self.streamed.writer is not None:
            self.streamed.writer.finish(self.model, self.tokenizer)
        else:
            save_pretrained(self.model, output / "model", self.tokenizer)
        if self.plan is not None:
            write_text(output / "plan.json", self.plan.to_json())
        if self.adapter is not None:
            shutil.copytree(self.adapter, output / "adapter")


def run_prune(job: Job) -> tuple[dict[str, Any], Finished]:
    """`task=prune`: measure, prune, measure, and where asked for recover, measure."""
    config, stages, device, source = job.config, job.stages, job.stages.device, source_of(job.config)
    recovery: Recovery | None = build(config.recovery, "recovery")
    with stages("load"):
        if streamed := stream(config, source, device, pick_dtype(config.dtype)):
            model, stored = streamed.model, streamed.stored
        else:
            model, stored = job.load(source)
        tokenizer = job.tokenizer(source)
        text = config.data.calibration
        check_length("data.calibration.sequence_length", text.sequence_length, model)
        documents = load_corpus(text.path or text.corpus, "calibration", config.corpora)
        windows = calibration_windows(documents, tokenizer, text.samples, text.sequence_length, text.seed)
        measures = Measures(config, tokenizer, device, model, stored)
        data = _data(job, recovery, measures, model, source)
    if streamed is None:
        check_finite(model)
    dense = size(model, stored)
    say(f"{config.model.path or 'the embedded model'}: {dense['parameters']:,} parameters; {config.method_name}, "
        f"{aim(config)}; {windows.numel():,} calibration tokens")  # fmt: skip
    columns = {}
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
    batches = token_batches(windows, min(text.batch_size, -(-len(windows) // world_size())), device)
    result = prune_model(model, config, batches, stages, stored, places, streamed)
    report, adapter = dict(result.report), None
    if streamed is None:
        round_to(model, stored)
    dropped = {u for g in result.graph.stacks for u in result.plan.removed.get(g.name, ())}
    columns["dense"]["outputs"] = {i: o for i, o in columns["dense"]["outputs"].items() if i not in dropped}
    with stages("evaluate_pruned"), streamed.evaluated() if streamed else nullcontext():
        columns["pruned"] = measures.of(model, key=(lambda: None) if streamed else None)
    if recovery is not None:
        facts = {"model": identity_of(source), "plan": digest([result.plan.to_json()])}
        found, adapter = _recovered(job, recovery, data, model, stored, measures, facts, source, result.graph)
        report["recovery"] = found
        with stages("evaluate_recovered"):
            columns["recovered"] = measures.of(model)
    if rank():
        return report, Finished(model=model, tokenizer=tokenizer, plan=result.plan)
    report |= measures.report(columns)
    if streamed is None:
        report |= _speeds(job, measures, columns, {"dense": source}, {list(columns)[-1]: model})
        to_type(model, stored)
    return report, Finished(model=model, tokenizer=tokenizer, plan=result.plan, streamed=streamed, adapter=adapter)


def run_evaluate(job: Job) -> tuple[dict[str, Any], None]:
    """`task=evaluate`: any model, and `eval.baseline` beside it."""
    config, stages = job.config, job.stages
    sources = {**({"dense": config.eval.baseline} if config.eval.baseline else {}), "model": source_of(config)}
    report: dict[str, Any] = {"model": str(config.model.path or "the embedded model")}
    measures: Measures | None = None
    model: Any = None
    columns = {}
    for name, source in sources.items():
        del model  # one at a time
        with stages("load"):
            model, stored = job.load(source)
            measures = measures or Measures(config, job.tokenizer(source), stages.device, model, stored)
        with stages(f"evaluate_{name}"):
            columns[name] = measures.of(model)
    assert measures is not None
    if rank():
        return report, None
    report |= measures.report(columns)
    others = {name: source for name, source in sources.items() if name != "model"}
    return report | _speeds(job, measures, columns, others, {"model": model}), None


def run_recover(job: Job) -> tuple[dict[str, Any], Finished]:
    """`task=recover`: fine-tune a pruned model's folder; what its report and plan said goes along."""
    config, stages = job.config, job.stages
    recovery: Recovery | None = build(config.recovery, "recovery")
    if recovery is None:
        raise ConfigError("task=recover: expected recovery=lora or another, got none")
    source = source_of(config)
    with stages("load"):
        model, stored = job.load(source)
        tokenizer = job.tokenizer(source)
        measures = Measures(config, tokenizer, stages.device, model, stored)
        data = _data(job, recovery, measures, model, config.eval.baseline)
    check_finite(model)
    columns = {}
    if config.eval.baseline:
        with stages("evaluate_dense"):
            columns["dense"] = measures.of(job.load(config.eval.baseline, stored)[0])
    with stages("evaluate_pruned"):
        columns["pruned"] = measures.of(model)
    facts = {"model": identity_of(source)}
    found, adapter = _recovered(job, recovery, data, model, stored, measures, facts, config.eval.baseline)
    with stages("evaluate_recovered"):
        columns["recovered"] = measures.of(model)
    if rank():
        return {}, Finished(model=model, tokenizer=tokenizer, plan=None)
    report = {**_before(Path(source)), "recovery": found, **measures.report(columns)}
    others = {"dense": config.eval.baseline} if config.eval.baseline else {}
    report |= _speeds(job, measures, columns, others, {"recovered": model})
    to_type(model, stored)
    path = Path(source).parent / "plan.json"
    plan = PruningPlan.load(path) if _before(Path(source)) and path.exists() else None
    return report, Finished(model=model, tokenizer=tokenizer, plan=plan, adapter=adapter)


def _before(folder: Path) -> dict[str, Any]:
    """Of the report of the run that a model folder came from: what still holds."""
    if folder.name != "model" or not (folder / "prunekit.json").exists():
        return {}
    try:
        report = json.loads((folder.parent / "report.json").read_text(encoding="utf-8"))
        return {key: report[key] for key in ("method", "ratio", "target", "policy", "layers") if key in report}
    except (OSError, ValueError):
        return {}


def _data(job: Job, recovery: Recovery | None, measures: Measures, model: nn.Module, dense: str | Path | None) -> Any:
    """What a recovery will be trained on; its mistakes are found before anything long begins."""
    if recovery is None:
        return None
    if recovery.needs_teacher and dense is None:
        raise ConfigError("recovery=distill: expected the dense model, its teacher, as eval.baseline, got none")
    known, seed = job.config.corpora, job.config.seed
    return prepare(model, measures.tokenizer, recovery, known=known, seed=seed, watch=measures.windows)


def _recovered(
    job: Job,
    recovery: Recovery,
    data: Any,
    model: nn.Module,
    stored: torch.dtype,
    measures: Measures,
    facts: Mapping[str, Any],
    dense: str | Path | None,
    graph: CouplingGraph | None = None,
) -> tuple[dict[str, Any], Path | None]:
    """Fine-tune the model in place; the report's part, and the adapter's folder where it was not merged."""
    config, folder = job.config, job.output / TRAINING
    facts = {**facts, "data": data.fingerprint, **flat({"recovery": config.recovery, "seed": config.seed})}
    facts |= {"teacher": identity_of(dense)} if recovery.needs_teacher and dense else {}
    _claim(folder, facts, config.resume)
    teacher = None
    if recovery.needs_teacher:
        assert dense is not None
        teacher = job.load(dense, stored)[0]
    modules = None
    if "all" not in recovery.kinds:
        graph = graph or trace(model, {"input_ids": torch.ones(2, 8, dtype=torch.long), "use_cache": False})
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
        round_to(model, stored)
    return found, None if recovery.merge else folder / "adapter"


def _perplexity(measures: Measures, name: str, model: nn.Module) -> float:
    """Measured by the first process: all must stop at the same step."""
    with together():
        value = 0.0 if rank() else measures.perplexity(model, name)
    return add_up(torch.tensor(value, dtype=torch.float64, device=measures.device)).item()


def modules_by_kind(model: nn.Module, graph: CouplingGraph) -> dict[str, set[str]]:
    """A group's kind → the modules that hold its units; to attention belongs what lies beside them (a lone KV head)."""
    found: dict[str, set[str]] = {"attention": set(), "mlp": set()}
    for group in graph.groups:
        found.setdefault(group.kind, set()).update(m.parameter.rpartition(".")[0] for m in group.members)
    homes = {name.rpartition(".")[0] for name in found["attention"]}
    beside = {name for name, _ in model.named_modules() if name.rpartition(".")[0] in homes}
    return found | {"attention": found["attention"] | beside - found["mlp"]}


def _claim(folder: Path, facts: Mapping[str, Any], resume: bool) -> None:
    """Make the folder of a recovery; one that is there is gone on with, if asked for and of the same facts."""
    path, facts = folder / "facts.json", json.loads(json.dumps(facts))
    with together():
        if rank():
            return
        if path.exists() and any(folder.glob("checkpoints/*")):
            if not resume:
                raise CheckpointError(f"{folder}: holds an unfinished recovery: resume=true goes on with it")
            before = json.loads(path.read_text(encoding="utf-8"))
            for key in sorted({*before, *facts}):
                if before.get(key) != facts.get(key):
                    made, now = before.get(key), facts.get(key)
                    raise CheckpointError(f"resume: {folder} was made with {key}={made}, this run has {now}; remove it")
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(facts))


def _speeds(
    job: Job,
    measures: Measures,
    columns: Mapping[str, dict[str, Any]],
    sources: Mapping[str, str | Path],
    models: Mapping[str, nn.Module],
) -> dict[str, Any]:
    """Tokens/s of the models, and of those that `sources` still have if there is room for them beside."""
    if not (job.config.eval.speed and measures.windows):
        return {}
    width = max(p.dtype.itemsize for model in models.values() for p in model.parameters())
    beside = {}
    for name, source in sources.items():
        if columns[name]["parameters"] * width <= _SHARE * free_bytes(job.stages.device):
            beside[name] = job.load(source)[0]
    with job.stages("speed"):
        return measures.speed({**beside, **models})


def source_of(config: RunConfig) -> str | Path:
    """Where the model is: the embedded one, a folder (of a model, or of a run, whose model it is), or a hub name."""
    source = config.model.path or DEMO_MODEL
    return Path(source) / "model" if (Path(source) / "model" / "config.json").is_file() else source


def identity_of(source: str | Path) -> str:
    """A folder's weight files with their sizes and times, or a hub name."""
    files = sorted(Path(source).glob("*.safetensors"))
    return f"{source} " + ", ".join(f"{f.name} {f.stat().st_size} {int(f.stat().st_mtime)}" for f in files)


def content_of(source: str | Path) -> str:
    """The content of a model's folder, byte for byte."""
    files = sorted([*Path(source).glob("*.safetensors"), *Path(source).glob("*.json"), *Path(source).glob("*.py")])
    return digest(part for file in files for part in (file.name, checksum(file)))


def aim(config: RunConfig) -> str:
    """The target in words."""
    if name := config.target.name:
        return f"down to {getattr(config.target, name):,g} {name}"
    return f"{config.ratio:.0%} of them to go"


def run_trace(config: RunConfig, output: Path) -> CouplingGraph:
    """`task=trace`: the model's coupled groups, with `graph.graphml` and `layer.svg` in the output folder."""
    ensure_empty(output)
    model = from_pretrained(source_of(config), trust_remote_code=config.model.trust_remote_code)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, 8), generator=torch.Generator().manual_seed(config.seed))
    graph = trace(model, {"input_ids": ids})
    write_couplings(graph, output)
    return graph


def load(
    source: str | Path, device: torch.device, stored: torch.dtype | None, trust_remote_code: bool
) -> tuple[Any, torch.dtype]:
    """The model in the type it computes in, and the type its result is stored in.

    Half-precision checkpoints compute in float32 on a CPU; the result is stored as the checkpoint was, or as asked.
    """
    model = from_pretrained(source, trust_remote_code=trust_remote_code)
    stored = stored or next(model.parameters()).dtype
    compute = torch.float32 if device.type == "cpu" and stored in (torch.float16, torch.bfloat16) else stored
    to_type(model, compute)
    return model.to(device), stored


def to_type(model: Any, dtype: torch.dtype) -> None:
    """Every weight, in place."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def round_to(model: nn.Module, stored: torch.dtype) -> None:
    """Round the weights to the type they will be stored in: what is measured is what is saved."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).to(parameter.dtype)


def ensure_empty(folder: Path, besides: Collection[str] = ()) -> None:
    """Raise CheckpointError where the output folder holds anything `besides` some names."""
    if folder.is_file() or (folder.is_dir() and any(path.name not in besides for path in folder.iterdir())):
        raise CheckpointError(f"output_dir: {folder} exists and is not empty; choose another or remove it")


def clear_results(output: Path) -> None:
    """Remove what `write_run` leaves, finished or not."""
    pictures = [f"{name}.svg" for name in ("layers", "ratio", "error", "curve", "tasks")]
    names = ["report.json", "report.md", "report.html", "plan.json", "model", "adapter", *pictures]
    half = [path for name in names for path in output.glob(f".{name}.*") if path.name != PARTIAL]
    for path in [*(output / name for name in [*names, ".hydra"]), *half]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_run(
    output: Path, report: Mapping[str, Any], provenance: Mapping[str, str], result: Finished | None = None
) -> None:
    """Write the run folder, `report.json` last; on any failure nothing of it stays."""
    try:
        (output / ".hydra").mkdir(parents=True, exist_ok=True)
        for name, text in provenance.items():
            write_text(output / ".hydra" / name, text)
        if result is not None:
            result.write(output)
        write_pictures(report, output)
        write_text(output / "report.md", render_markdown(report))
        write_text(output / "report.html", render_html(report))
        write_text(output / "report.json", to_json(report))
    except BaseException as error:
        clear_results(output)
        if isinstance(error, OSError):
            raise PrunekitError(f"{output}: can't be written: {error.strerror}") from error
        raise


_JOBS: dict[str, Callable[[Job], tuple[dict[str, Any], Finished | None]]] = {
    "prune": run_prune,
    "evaluate": run_evaluate,
    "recover": run_recover,
}
