"""The stages of a run in order: load, measure, trace, prune, measure, save; the only module that knows them all."""

from __future__ import annotations

import copy
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from prunekit import config as cfg
from prunekit.checkpoint import from_pretrained, load_tokenizer, save_pretrained
from prunekit.checkpoint.save import write_text
from prunekit.compensation.apply import Bias
from prunekit.config import RunConfig
from prunekit.console import say
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import batches as token_batches
from prunekit.data.tokens import calibration_windows, evaluation_windows
from prunekit.errors import CheckpointError, ConfigError, DataError, PrunekitError, TraceError
from prunekit.evaluation.cost import size, tokens_per_second
from prunekit.evaluation.generation import continuation
from prunekit.evaluation.perplexity import perplexity, protocol
from prunekit.graph import CoupledGroup, CouplingGraph, trace
from prunekit.graph.capture import without_cache
from prunekit.plan import PruningPlan
from prunekit.policies import Budget, Cost, Policy, Scope, Setting, weights_cost
from prunekit.report import render_markdown, to_json, write_pictures
from prunekit.report.couplings import write_couplings
from prunekit.schedules import Layerwise, Schedule, Task
from prunekit.surgery import apply_plan

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
_BESIDE_LIMIT = 2 << 30  # bytes up to which a dense copy stays in memory for timing both models in turn


@dataclass(frozen=True, kw_only=True)
class Result:
    """What pruning leaves: the model (changed in place), the plan, the report's figures, the graph it was cut by."""

    model: Any
    plan: PruningPlan
    report: dict[str, Any]
    graph: CouplingGraph


@dataclass
class Stages:
    """Seconds and peak memory of every stage."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one stage."""
        reset_peak(self.device)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)
        self.peak_memory_bytes[name] = max(peak_memory(self.device), self.peak_memory_bytes.get(name, 0))


def prune(
    model: nn.Module,
    *,
    ratio: float = 0.2,
    method: str = "slimgpt",
    calibration: Tensor | Iterable[Mapping[str, Any]] | None = None,
    overrides: Sequence[str] = (),
) -> Result:
    """Prune a model in place: trace it, choose units, repair what stays, cut.

    Args:
        model: any module `torch.export` can capture.
        ratio: share of all the model's parameters to remove, in (0, 1).
        method: slimgpt, llm_pruner, magnitude or random.
        calibration: token ids, int64 [N, T], of a causal language model; or keyword-argument dicts of any model's
            forward call. The first one (two of its sequences) is also what the model is traced and checked with.
        overrides: the strings the command line takes, e.g. ["policy=uniform", "importance.heads=diagonal"].

    Returns:
        The result; `report` holds `method`, `seed`, `versions`, `ratio`, `parameters`, `layers`, `seconds`.

    Raises:
        ConfigError: an unknown method or option, a ratio out of range or of reach.
        DataError: calibration data missing, empty, or leading to NaN.
        TraceError: a model the tracer can't follow, or with nothing to prune.
        SurgeryError: the cut model would not compute what it should; the model is then put back.
    """
    config = cfg.check(cfg.compose([f"method={method}", f"ratio={ratio}", *overrides]))
    batches = _batches(model, calibration, config.data.calibration.batch_size)
    return prune_model(model, config, batches, Stages(_device_of(model)))


def _batches(model: nn.Module, calibration: Any, batch_size: int) -> list[Mapping[str, Any]]:
    if calibration is None:
        raise DataError("calibration: expected token ids [N, T] or keyword-argument dicts, got None")
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2 or calibration.is_floating_point() or calibration.shape[1] < 2 or not len(calibration):
            raise DataError(
                "calibration: expected int64 token ids [N, T] with T ≥ 2, "
                f"got {calibration.dtype} {tuple(calibration.shape)}"
            )
        rows = getattr(getattr(model, "get_input_embeddings", lambda: None)(), "num_embeddings", None)
        if rows and not 0 <= int(calibration.min()) <= int(calibration.max()) < rows:
            found = f"{int(calibration.min())} to {int(calibration.max())}"
            raise DataError(f"calibration: expected token ids in [0, {rows}), got {found}")
        batches: list[Any] = token_batches(calibration, batch_size, _device_of(model))
    else:
        batches = [without_cache(model, batch) for batch in calibration]
    if not batches or not all(isinstance(batch, Mapping) for batch in batches):
        raise DataError("calibration: expected at least one dict of keyword arguments")
    return batches


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    if first is None:
        raise TraceError(f"{type(model).__name__}: it has no parameters to prune")
    return first.device


def prune_model(
    model: nn.Module,
    config: RunConfig,
    batches: Sequence[Mapping[str, Any]],
    stages: Stages,
    stored: torch.dtype | None = None,
) -> Result:
    """Trace, allocate, choose and repair, cut; bytes are counted in the type `stored`, else in the weights' own."""
    check_finite(model)
    with stages("trace"):
        graph = trace(model, example_of(batches[0]))
    with stages("prune"):
        choice = plan_choice(model, graph, config, batches, stored)
        total = num_parameters(model)
        before = snapshot(model, choice.task.groups, everything=choice.task.independent)
        try:
            plan = choice.schedule.run(choice.task)
            without = [model.get_submodule(name.rpartition(".")[0]) for name, bias in before.items() if bias is None]
            apply_plan(model, graph, plan)
        except BaseException:
            restore(model, before)
            raise
    note_biases(model, [module for module in without if module.bias is not None])
    report = figures(config, choice, plan, (total, num_parameters(model)), stages)
    if config.target.name == "latency":
        from prunekit.costs.timing import timed

        report["target"]["measured"] = timed(model, timing_example(batches[0], config))
    return Result(model=model, plan=plan, report=report, graph=graph)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Everything that is settled before units are chosen: who chooses (`schedule.run(task)`), and how much goes.

    `groups` also holds those that a policy leaves whole.
    """

    schedule: Schedule
    task: Task
    groups: Sequence[CoupledGroup]
    shares: Mapping[str, float]
    notes: Mapping[str, Any]


def plan_choice(
    model: nn.Module,
    graph: CouplingGraph,
    config: RunConfig,
    batches: Sequence[Mapping[str, Any]],
    stored: torch.dtype | None = None,
) -> Choice:
    """Build what the configuration names, spread the target over the groups it may cut."""
    scope: Scope = cfg.build(config.scope, "scope") or Scope()
    groups = scope.included(chosen_groups(graph, config.groups), [*graph.groups, *graph.stacks])
    importance = cfg.build(config.importance, "importance")
    compensation = cfg.build(config.compensation, "compensation")
    policy: Policy = cfg.build(config.policy, "policy")
    cost, limit = objective(model, graph, groups, batches, config, stored)
    setting = Setting(
        model=model, graph=graph, groups=groups, batches=batches, importance=importance, cost=cost, limit=limit
    )
    schedule: Schedule = cfg.build(config.schedule, "schedule")
    if compensation is not None or isinstance(schedule, Layerwise):
        name = type(schedule if compensation is None else compensation).__name__.lower()
        check_repairable(f"schedule={name}" if compensation is None else f"compensation={name}", groups)
    shares = policy.group_shares(setting)
    cut = [group for group in groups if shares[group.name] > 0] or groups
    if isinstance(compensation, Bias) and cost.name in ("parameters", "bytes"):
        limit -= added_biases(model, cut) * cost({}) / graph.num_parameters()
    budget = Budget(
        slots=scope.slots(cut, shares, floors(model, cut), multiples(model, cut)),
        cost=cost,
        limit=limit,
        ranking=scope.ranking,
        comparable=getattr(importance, "normalisation", "none") != "none",
        key=f"target.{config.target.name}" if config.target.name else "ratio",
        hint="" if scope.min_units == 1 else f" (scope.min_units={scope.min_units})",
    )
    task = Task(
        model=model,
        graph=graph,
        groups=cut,
        budget=budget,
        batches=batches,
        importance=importance,
        compensation=compensation,
        rounds=scope.rounds,
        protected={group.name: scope.protected(group) for group in cut},
        independent="independent" in cfg.kinds_of(config.groups),
    )
    return Choice(schedule=schedule, task=task, groups=groups, shares=shares, notes=setting.notes)


def check_repairable(option: str, groups: Sequence[CoupledGroup]) -> None:
    """Raise ConfigError where groups have no single consumer whose inputs could be looked at."""
    for group in groups:
        if len(group.consumers) != 1:
            raise ConfigError(
                f"{option}: {group.name} ({group.kind}) has {len(group.consumers) or 'no'} consumers, expected one; "
                "use schedule=oneshot compensation=none"
            )


def objective(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[CoupledGroup],
    batches: Sequence[Mapping[str, Any]],
    config: RunConfig,
    stored: torch.dtype | None,
) -> tuple[Cost, float]:
    """What counts, and what it must come down to."""
    name = config.target.name
    if name in ("flops", "latency"):
        from prunekit.costs import flops_cost, latency_cost

        if any(group.kind == "layer" for group in groups):
            raise ConfigError(f"target.{name}: can't be told for whole layers; use target.parameters or ratio")
        example = timing_example(batches[0], config)
        cost = flops_cost(model, graph, example) if name == "flops" else latency_cost(model, graph, groups, example)
    elif name == "bytes":
        sizes = {n: (stored or p.dtype).itemsize for n, p in model.named_parameters()}
        cost = weights_cost(graph, "bytes", sizes)
    else:
        cost = weights_cost(graph)
    return cost, getattr(config.target, name) if name else cost({}) * (1 - config.ratio)


def timing_example(batch: Mapping[str, Any], config: RunConfig) -> Mapping[str, Any]:
    """What FLOPs and latency are for: `target.batch` rows of `target.tokens` token ids, or any other model's batch."""
    if not isinstance(ids := batch.get("input_ids"), Tensor) or ids.ndim != 2:
        return batch
    rows, tokens = config.target.batch, config.target.tokens
    repeated = ids[:1].repeat(rows, -(-tokens // ids.shape[1]))[:, :tokens]
    kept = {key: value for key, value in batch.items() if not isinstance(value, Tensor)}
    return {**kept, "input_ids": repeated}


def floors(model: nn.Module, groups: Sequence[CoupledGroup]) -> dict[str, int]:
    """Units that a model needs: as many experts as a token is sent to."""
    config = getattr(model, "config", None)
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
    needed = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    return {group.name: max(needed) for group in groups if group.kind == "expert" and needed}


def multiples(model: nn.Module, groups: Sequence[CoupledGroup]) -> dict[str, int]:
    """What a group's kept units must be a multiple of: rows of stacked experts' weights go in 16 bytes."""
    stacked = {
        name: max(16 // parameter.element_size(), 1)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not isinstance(model.get_submodule(name.rpartition(".")[0]), _ConvNd)
    }
    found: dict[str, int] = {}
    for group in groups:
        for member in group.members if group.kind != "expert" else ():
            if member.parameter in stacked and member.dim > 0:
                found[group.name] = stacked[member.parameter]
    return found


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def added_biases(model: nn.Module, groups: Sequence[CoupledGroup]) -> int:
    """How many parameters the biases have that consumers lack."""
    found = {}
    for member in (member for group in groups for member in group.consumers):
        module = model.get_submodule(member.parameter.rpartition(".")[0])
        if getattr(module, "bias", None) is None:
            found[member.parameter] = model.get_parameter(member.parameter).shape[1 - member.dim]
    return sum(found.values())


def snapshot(model: nn.Module, groups: Sequence[CoupledGroup], everything: bool) -> dict[str, Tensor | None]:
    """Copies of what choosing may change: the consumers and their biases (None where there is none), or all members."""
    names = {m.parameter for g in groups for m in (g.members if everything else g.consumers)}
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor | None] = {n: parameters[n].detach().clone() for n in names if n in parameters}
    for name in {f"{name.rpartition('.')[0]}.bias" for name in names} - names:
        module = model.get_submodule(name.rpartition(".")[0])
        if "bias" in module._parameters:
            found[name] = None if (bias := module._parameters["bias"]) is None else bias.detach().clone()
    return found


def restore(model: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """Put copies back; a bias that was not there goes."""
    for name, weight in before.items():
        if weight is None:
            model.get_submodule(name.rpartition(".")[0])._parameters["bias"] = None
        else:
            model.get_parameter(name).data.copy_(weight)


def note_biases(model: nn.Module, given: Sequence[nn.Module]) -> None:
    """Tell the config which modules were given a bias, so that a saved model is loaded with it."""
    config: Any = getattr(model, "config", None)
    paths = [path for path, module in model.named_modules() if module in set(given)]
    if paths and config is not None:
        config.extra_biases = sorted({*paths, *(getattr(config, "extra_biases", None) or ())})
        say(f"{len(paths)} modules got a bias: prunekit.from_pretrained loads it, other loaders leave it out")


def check_finite(model: nn.Module) -> None:
    """Raise DataError where a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise DataError(f"{name}: the weights hold NaN or infinity")


def example_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A small example for tracing: two samples, of token ids the first eight."""

    def small(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        value = value[:2] if len(value) > 1 else torch.cat([value, value])
        return value[:, :8] if value.ndim == 2 and not value.is_floating_point() else value

    return {name: small(value) for name, value in batch.items()}


def chosen_groups(graph: CouplingGraph, choice: Any) -> list[CoupledGroup]:
    """The prunable groups of the kinds a choice (one or a list) names; each kind must have one.

    For `block` of a model without any, every exact group.
    """
    found: list[CoupledGroup] = []
    prunable = [group for group in (*graph.groups, *graph.stacks) if group.prunable]
    for name in cfg.kinds_of(choice):
        groups = [group for group in prunable if group.kind in cfg.KINDS[name]]
        if not groups and name == "block":
            groups = [group for group in prunable if group.exact and group.kind != "layer"]
        if not groups:
            kinds = ", ".join(sorted({group.kind for group in prunable})) or "none"
            raise ConfigError(f"groups={name}: the model has no prunable group of that kind; it has: {kinds}")
        found += [group for group in groups if group not in found]
    return found


def figures(
    config: RunConfig, choice: Choice, plan: PruningPlan, parameters: tuple[int, int], stages: Stages
) -> dict[str, Any]:
    """The report of pruning alone; `parameters` dense and pruned."""
    total, left = parameters
    groups, budget = choice.groups, choice.task.budget
    target = {}
    if config.target.name:
        achieved = budget.cost({name: len(units) for name, units in plan.removed.items()})
        measured = {"measure": budget.cost.name, "limit": budget.limit, "dense": budget.cost({}), "achieved": achieved}
        target = {"target": measured}
    layers: dict[int | None, dict[str, Any]] = {}
    for group in groups:
        kept = group.num_units - len(plan.removed.get(group.name, ()))
        row = layers.setdefault(group.layer, {"index": group.layer})
        entry = row.setdefault(group.kind if group.layer is not None else group.name, {"kept": 0, "total": 0})
        entry["kept"] += kept  # a layer may hold two groups of a kind: shared and routed experts
        entry["total"] += group.num_units
    return {
        "method": config.method_name,
        "seed": config.seed,
        "versions": versions(),
        "ratio": {"target": None if config.target.name else config.ratio, "achieved": 1 - left / total},
        "parameters": {"dense": total, "pruned": left},
        **target,
        "policy": {"shares": choice.shares, **choice.notes},
        "layers": list(layers.values()),
        "seconds": stages.seconds,
        "peak_memory_bytes": stages.peak_memory_bytes,
    }


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    found = {"python": platform.python_version()}
    for name in ("prunekit", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "checkout"
    return found


def run(config: RunConfig, output: Path, provenance: Mapping[str, str] | None = None) -> Result:
    """The command line's job: everything from the model's name to the finished folder.

    Args:
        config: what to do.
        output: a new or empty folder.
        provenance: file name → text, kept in `.hydra/`: what repeats the run.

    Raises:
        PrunekitError: whatever was wrong with the request; `output` then holds no result.
    """
    ensure_empty(output)
    torch.manual_seed(config.seed)
    device, stored = pick_device(config.device), pick_dtype(config.dtype)
    stages = Stages(device)
    source = config.model.path or DEMO_MODEL
    with stages("load"):
        model, tokenizer, stored = load(source, device, stored, config.model.trust_remote_code)
        data = config.data.calibration
        documents = load_corpus(data.path or data.corpus, "calibration", config.corpora)
        windows = calibration_windows(documents, tokenizer, data.samples, data.sequence_length, data.seed)
        evals = eval_windows(config, tokenizer)
    check_finite(model)
    say(f"{config.model.path or 'the embedded model'}: {size(model)['parameters']:,} parameters; {config.method_name}, "
        f"{aim(config)}; {windows.numel():,} calibration tokens")  # fmt: skip
    with stages("evaluate_dense"):
        dense = measure(model, tokenizer, evals, config)
    beside = (
        copy.deepcopy(model) if size(model)["weight_bytes"] <= _BESIDE_LIMIT and config.eval.speed and evals else None
    )
    dense_size = size(model, stored)
    result = prune_model(model, config, token_batches(windows, data.batch_size, device), stages, stored)
    round_to(model, stored)
    with stages("evaluate_pruned"):
        pruned = measure(model, tokenizer, evals, config)
        speeds = tokens_per_second([beside or model, model], next(iter(evals.values()))[:8]) if evals and beside else []
    report = result.report | {
        "weight_bytes": {"dense": dense_size["weight_bytes"], "pruned": size(model, stored)["weight_bytes"]},
        "perplexity": {
            name: {"dense": dense["perplexity"][name], "pruned": value, "protocol": protocol(evals[name])}
            for name, value in pruned["perplexity"].items()
        },
        "samples": {"dense": dense["sample"], "pruned": pruned["sample"]},
    }
    if speeds:
        report["tokens_per_second"] = {"dense": speeds[0], "pruned": speeds[1]}
    with stages("save"):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(stored)
        model.config.dtype = stored
        write_run(output, model, tokenizer, result.plan, report, provenance or {})
    return Result(model=model, plan=result.plan, report=report, graph=result.graph)


def aim(config: RunConfig) -> str:
    """The target in words."""
    if name := config.target.name:
        return f"down to {getattr(config.target, name):,g} {name}"
    return f"{config.ratio:.0%} of them to go"


def run_trace(config: RunConfig, output: Path) -> CouplingGraph:
    """`task=trace`: the model's coupled groups, with `graph.graphml` and `layer.svg` in the output folder."""
    ensure_empty(output)
    source = config.model.path or DEMO_MODEL
    model = from_pretrained(source, trust_remote_code=config.model.trust_remote_code)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, 8), generator=torch.Generator().manual_seed(config.seed))
    graph = trace(model, {"input_ids": ids})
    write_couplings(graph, output)
    return graph


def load(source: str | Path, device: torch.device, stored: torch.dtype | None, trust_remote_code: bool) -> Any:
    """The model in the type it computes in, its tokenizer, and the type its result is stored in.

    Half-precision checkpoints compute in float32 on a CPU; the result is stored as the checkpoint was, or as asked.
    """
    model = from_pretrained(source, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code)
    stored = stored or next(model.parameters()).dtype
    compute = torch.float32 if device.type == "cpu" and stored in (torch.float16, torch.bfloat16) else stored
    for parameter in model.parameters():
        parameter.data = parameter.data.to(compute)
    model.config.dtype = compute
    return model.to(device), tokenizer, stored


def round_to(model: nn.Module, stored: torch.dtype) -> None:
    """Round the weights to the type they will be stored in: what is measured is what is saved."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).to(parameter.dtype)


def eval_windows(config: RunConfig, tokenizer: Any) -> dict[str, Tensor]:
    """Corpus name → token windows [N, window]."""
    found = {}
    for name in config.eval.corpora:
        documents = load_corpus(name, "eval", config.corpora)
        key = Path(name).stem if "/" in name else name
        found[key] = evaluation_windows(documents, tokenizer, config.eval.window, config.eval.max_tokens, name)
    return found


def measure(model: Any, tokenizer: Any, evals: Mapping[str, Tensor], config: RunConfig) -> dict[str, Any]:
    """Perplexity on every corpus, and a sample."""
    values = {name: perplexity(model, w, config.eval.batch_size, name) for name, w in evals.items()}
    sample = continuation(model, tokenizer, config.eval.prompt, config.eval.new_tokens) if config.eval.prompt else None
    return {"perplexity": values, "sample": sample}


def ensure_empty(folder: Path) -> None:
    """Raise CheckpointError where the output folder holds anything."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise CheckpointError(f"output_dir: {folder} exists and is not empty; choose another or remove it")


def write_run(
    output: Path,
    model: Any,
    tokenizer: Any,
    plan: PruningPlan,
    report: Mapping[str, Any],
    provenance: Mapping[str, str],
) -> None:
    """Write the run folder, `report.json` last; on any failure nothing of it stays."""
    names = ("report.json", "report.md", "layers.svg", "plan.json", "model", ".hydra")
    try:
        (output / ".hydra").mkdir(parents=True)
        for name, text in provenance.items():
            write_text(output / ".hydra" / name, text)
        save_pretrained(model, output / "model", tokenizer)
        write_text(output / "plan.json", plan.to_json())
        write_pictures(report, output)
        write_text(output / "report.md", render_markdown(report))
        write_text(output / "report.json", to_json(report))
    except BaseException as error:
        for name in names:
            shutil.rmtree(output / name, ignore_errors=True) if (output / name).is_dir() else (
                (output / name).unlink(missing_ok=True)
            )
        if isinstance(error, OSError):
            raise PrunekitError(f"{output}: can't be written: {error.strerror}") from error
        raise


def pick_device(name: str) -> torch.device:
    """The device a name stands for; `auto` takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} can't be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """The type a name stands for; None for `auto`."""
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"dtype: unknown {name!r}; available: {', '.join(known)}")
    return known[name]


def reset_peak(device: torch.device) -> None:
    """Start measuring peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass


def peak_memory(device: torch.device) -> int:
    """Peak bytes since `reset_peak`: allocated on a GPU, resident elsewhere (ever, where the system can't reset)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
