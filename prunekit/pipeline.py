"""Pruning in order: trace, allocate, choose and repair, cut; on models that are loaded, whole or
streamed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit import config as cfg
from prunekit.allocation.budget import Budget
from prunekit.allocation.costs.base import CostSetting
from prunekit.allocation.groups import chosen_groups
from prunekit.allocation.limits import added_biases, floors, multiples
from prunekit.allocation.objective import build_cost, set_objective
from prunekit.allocation.scope import Scope
from prunekit.calibration.consumers import consumers_of
from prunekit.calibration.store import Store
from prunekit.checkpoint.streamed import Streamed, layers_path
from prunekit.compensation.bias import Bias
from prunekit.config import RunConfig
from prunekit.data.batches import batches as token_batches
from prunekit.errors import ConfigError, DataError, TraceError
from prunekit.graph import CouplingGraph, Group, trace
from prunekit.graph.example import example_of
from prunekit.model.inputs import without_cache
from prunekit.plan import PruningPlan
from prunekit.policies import Policy, Setting
from prunekit.runtime.processes import rank, together, world_size
from prunekit.runtime.stages import Stages
from prunekit.runtime.versions import versions
from prunekit.schedules import Assignment, Layerwise, Schedule, State
from prunekit.surgery import shapes
from prunekit.surgery.check import apply_plan
from prunekit.surgery.snapshot import note_biases, restore, snapshot

DEMO_MODEL = Path(__file__).parent / "demo" / "model"
STATE = ".state"  # what an unfinished run leaves in its output folder


@dataclass(frozen=True, kw_only=True)
class Result:
    """What pruning leaves: the model (changed in place), the plan, the report's figures, the graph
    it was cut by.
    """

    model: Any
    plan: PruningPlan
    report: dict[str, Any]
    graph: CouplingGraph


def prune(
    model: nn.Module,
    *,
    ratio: float = 0.2,
    method: str = "slimgpt",
    calibration: Tensor | Iterable[Mapping[str, Any]] | None = None,
    overrides: Sequence[str] = (),
    state: str | Path | None = None,
) -> Result:
    """Prune a model in place: trace it, choose units, repair what stays, cut.

    Args:
        model: any module `torch.export` can capture.
        ratio: share of all the model's parameters to remove, in (0, 1).
        method: slimgpt, llm_pruner, magnitude or random.
        calibration: token ids, int64 [N, T], of a causal language model; or keyword-argument dicts
            of any model's forward call. The first one (two of its sequences) is also what the model
            is traced and checked with.
        overrides: the strings the command line takes, e.g. ["policy=uniform",
            "importance.heads=diagonal"].
        state: a folder for what a layer-wise run has finished;
            with "resume=true" among the overrides a run that was
            broken off goes on from there. Removed at the end.

    Returns:
        The result; `report` holds `method`, `seed`, `versions`, `ratio`, `parameters`, `layers`,
        `seconds`.

    Raises:
        ConfigError: an unknown method or option, a ratio out of range or of reach.
        DataError: calibration data missing, empty, or leading to NaN.
        TraceError: a model the tracer can't follow, or with nothing to prune.
        SurgeryError: the cut model would not compute what it should; the model is then put back.
    """
    config = cfg.check(cfg.compose([f"method={method}", f"ratio={ratio}", *overrides]))
    batches = _batches(model, calibration, config.data.calibration.batch_size)
    places = Places(
        state=Path(state) if state else None,
        activations=activations_folder(config, None),
        identity=f"{type(model).__name__} {_digest(model)}" if state else "",
    )
    return prune_model(model, config, batches, Stages(_device_of(model)), places=places)


def _batches(model: nn.Module, calibration: Any, batch_size: int) -> list[Mapping[str, Any]]:
    if calibration is None:
        raise DataError(
            "calibration: expected token ids [N, T] or keyword-argument dicts, got None"
        )
    if isinstance(calibration, Tensor):
        if (
            calibration.ndim != 2
            or calibration.is_floating_point()
            or calibration.shape[1] < 2
            or not len(calibration)
        ):
            raise DataError(
                "calibration: expected int64 token ids [N, T] with T ≥ 2, "
                f"got {calibration.dtype} {tuple(calibration.shape)}"
            )
        rows = getattr(
            getattr(model, "get_input_embeddings", lambda: None)(), "num_embeddings", None
        )
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


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a run keeps what is finished (`state`), activations that memory has no room for
    (`activations`), and a streamed model's layers (`model`).

    `identity`: what tells the dense model from others; `undo`: put the model back after a failure;
    `keep`: the state is still needed afterwards.
    """

    state: Path | None = None
    activations: Path | None = None
    model: Path = Path("model")
    identity: str = ""
    undo: bool = True
    keep: bool = False


def prune_model(
    model: nn.Module,
    config: RunConfig,
    batches: Sequence[Mapping[str, Any]],
    stages: Stages,
    stored: torch.dtype | None = None,
    places: Places = Places(),
    streamed: Streamed | None = None,
) -> Result:
    """Trace, allocate, choose and repair, cut; bytes are counted in the type `stored`, else in the
    weights' own.

    A `streamed` model is cut and written layer by layer; its weights stay on disk.
    """
    if streamed is None:
        check_finite(model)
    with stages("trace"):
        graph = trace(model, example_of(batches[0]))
    with stages("prune"):
        choice = allocate(model, graph, config, batches, stored)
        task = replace(
            choice.task,
            state=open_state(config, graph, batches, places),
            store=Store(
                stages.device, config.memory.budget, config.memory.host, places.activations
            ),
        )
        if streamed:
            streamed.write_to(places.model, resume=bool(task.state and task.state.there))
            task = replace(task, layers=partial(streamed.layers, graph))
        total = num_parameters(model)
        changes = (
            task.independent
            or task.compensation is not None
            or isinstance(choice.schedule, Layerwise)
        )
        before = (
            snapshot(model, task.groups, task.independent, copies=places.undo and not streamed)
            if changes
            else {}
        )
        try:
            plan = choice.schedule.run(task)
            without = [
                model.get_submodule(name.rpartition(".")[0])
                for name, bias in before.items()
                if bias is None
            ]
            if streamed is None:
                apply_plan(model, graph, plan)
            else:
                streamed.complete(layers_path(graph))
        except BaseException:
            restore(model, before)
            if task.state:
                task.state.drop_if_empty()
            raise
    note_biases(model, [module for module in without if module.bias is not None])
    report = figures(config, choice, plan, (total, num_parameters(model)), stages)
    if task.store and any(task.store.peak.values()):
        report["activation_bytes"] = task.store.peak
    if remeasure := choice.task.budget.cost.remeasure:
        report["target"]["measured"] = remeasure(model)
    if task.state and not places.keep:
        task.state.remove()
    return Result(model=model, plan=plan, report=report, graph=graph)


def activations_folder(config: RunConfig, output: Path | None) -> Path | None:
    """Where this process's activations go that memory has no room for: a folder of their own; the
    system's if None.
    """
    if config.memory.folder is None and output is None:
        return None
    whose = (
        os.getpid()
        if output is None
        else hashlib.sha256(str(output.absolute()).encode()).hexdigest()[:8]
    )
    parent = (
        Path(config.memory.folder) if config.memory.folder else output / STATE if output else Path()
    )
    return parent / f"activations-{whose}-{rank()}"


def open_state(
    config: RunConfig, graph: CouplingGraph, batches: Sequence[Mapping[str, Any]], places: Places
) -> State | None:
    """The state of a layer-wise run, with everything its result depends on."""
    if places.state is None:
        return None
    hashed = hashlib.sha256()
    for tensor in (t for batch in batches for t in batch.values() if isinstance(t, Tensor)):
        hashed.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    sections = (
        "ratio",
        "target",
        "groups",
        "shapes",
        "seed",
        "dtype",
        "importance",
        "policy",
        "scope",
        "cost",
        "compensation",
        "schedule",
        "data",
    )
    facts = {
        "model": places.identity,
        "graph": graph.fingerprint,
        "calibration": hashed.hexdigest()[:16],
        "processes": world_size(),
        "torch": torch.__version__,
    }
    facts |= cfg.flat({key: value for key, value in asdict(config).items() if key in sections})
    with together():  # before one of them writes
        return State(places.state, facts, config.resume)


def _digest(model: nn.Module) -> str:
    """Tells a model's weights from others'."""
    hashed = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sums = (
            parameter.detach().double().sum().item(),
            parameter.detach().flatten()[:64].double().tolist(),
        )
        hashed.update(f"{name} {tuple(parameter.shape)} {sums}".encode())
    return hashed.hexdigest()[:16]


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_finite(model: nn.Module) -> None:
    """Raise DataError where a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise DataError(f"{name}: the weights hold NaN or infinity")


def figures(
    config: RunConfig,
    choice: Allocation,
    plan: PruningPlan,
    parameters: tuple[int, int],
    stages: Stages,
) -> dict[str, Any]:
    """The report of pruning alone; `parameters` dense and pruned."""
    total, left = parameters
    groups, budget = choice.groups, choice.task.budget
    target = {}
    if stated := bool(config.target.given) or budget.cost.name != "parameters":
        exact = round if budget.cost.stored else float
        achieved = exact(budget.cost({name: len(units) for name, units in plan.removed.items()}))
        measured = {
            "measure": budget.cost.name,
            "limit": budget.limit,
            "dense": exact(budget.cost({})),
            "achieved": achieved,
        }
        target = {"target": measured}
    layers: dict[int | None, dict[str, Any]] = {}
    for group in groups:
        kept = group.num_units - len(plan.removed.get(group.name, ()))
        row = layers.setdefault(group.layer, {"index": group.layer})
        entry = row.setdefault(
            group.kind if group.layer is not None else group.name, {"kept": 0, "total": 0}
        )
        entry["kept"] += kept  # a layer may hold two groups of a kind: shared and routed experts
        entry["total"] += group.num_units
    return {
        "method": config.method_name,
        "seed": config.seed,
        "versions": versions(),
        "ratio": {
            "target": None if stated else config.ratio,
            "achieved": 1 - left / total,
        },
        "parameters": {"dense": total, "pruned": left},
        **target,
        "policy": {"shares": choice.shares, **choice.notes},
        "layers": list(layers.values()),
        "seconds": stages.seconds,
        "peak_memory_bytes": stages.peak_memory_bytes,
    }


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Everything that is settled before units are chosen: who chooses (`schedule.run(task)`), and
    how much goes.

    `groups` also holds those that a policy leaves whole.
    """

    schedule: Schedule
    task: Assignment
    groups: Sequence[Group]
    shares: Mapping[str, float]
    notes: Mapping[str, Any]


def allocate(
    model: nn.Module,
    graph: CouplingGraph,
    config: RunConfig,
    batches: Sequence[Mapping[str, Any]],
    stored: torch.dtype | None = None,
) -> Allocation:
    """Build what the configuration names, spread the target over the groups it may cut."""
    scope: Scope = cfg.build(config.scope, "scope") or Scope()
    groups = scope.included(chosen_groups(graph, config.groups), [*graph.groups, *graph.stacks])
    importance = cfg.build(config.importance, "importance")
    compensation = cfg.build(config.compensation, "compensation")
    policy: Policy = cfg.build(config.policy, "policy")
    objective = set_objective(
        build_cost(config),
        CostSetting(model=model, graph=graph, groups=groups, batches=batches, stored=stored),
        config,
    )
    cost, limit = objective.cost, objective.limit
    setting = Setting(
        model=model,
        graph=graph,
        groups=groups,
        batches=batches,
        importance=importance,
        cost=cost,
        limit=limit,
    )
    schedule: Schedule = cfg.build(config.schedule, "schedule")
    if compensation is not None or isinstance(schedule, Layerwise):
        name = type(schedule if compensation is None else compensation).__name__.lower()
        check_repairable(
            f"schedule={name}" if compensation is None else f"compensation={name}", model, groups
        )
    shares = policy.group_shares(setting)
    uniform = config.shapes == "uniform"
    if uniform:
        shapes.check_all_there(groups, graph)
        shares = shapes.shared(shares, groups)
    cut = [group for group in groups if shares[group.name] > 0] or groups
    if isinstance(compensation, Bias) and cost.stored:
        limit -= added_biases(model, cut) * cost({}) / graph.num_parameters()
    budget = Budget(
        slots=scope.slots(
            cut,
            shares,
            floors(model, cut),
            multiples(model, cut, config, scope),
            shapes.stock_counts(model, graph, cut) if uniform else {},
            uniform,
        ),
        cost=cost,
        limit=limit,
        ranking=scope.ranking,
        comparable=getattr(importance, "normalisation", "none") != "none",
        key=objective.option,
        hint=_hint(config, scope),
    )
    task = Assignment(
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
    return Allocation(
        schedule=schedule, task=task, groups=groups, shares=shares, notes=setting.notes
    )


def check_repairable(option: str, model: nn.Module, groups: Sequence[Group]) -> None:
    """Raise ConfigError where groups have no linear consumers whose inputs could be looked at."""
    for group in groups:
        try:
            consumers_of(model, group)
        except TraceError as error:
            raise ConfigError(
                f"{option}: {error} ({group.kind}); use schedule=oneshot compensation=none"
            ) from error


def _hint(config: RunConfig, scope: Scope) -> str:
    """Which options narrow what can go, for messages."""
    found = [f"scope.min_units={scope.min_units}"] if scope.min_units != 1 else []
    found += [f"shapes={config.shapes}"] if config.shapes != "free" else []
    return f" ({', '.join(found)})" if found else ""
