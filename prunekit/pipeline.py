"""Pruning in order: trace, allocate, choose and repair, cut; of models in memory or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import EllipsisType
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from prunekit import config as cfg
from prunekit.allocation.budget import Budget
from prunekit.allocation.costs.base import CostModel, CostSetting
from prunekit.allocation.groups import (
    choose_groups,
    list_groups,
    refuse_vocabulary,
    suggest_channels,
)
from prunekit.allocation.limits import count_added_biases, find_demands
from prunekit.allocation.objective import Objective, set_objective
from prunekit.allocation.scope import Scope
from prunekit.allocation.shape import count_removed
from prunekit.allocation.slots import gather_steps, make_slots
from prunekit.calibration.store import Store
from prunekit.checkpoint.streamed import Streamed
from prunekit.compensation import Compensation
from prunekit.config import RunConfig
from prunekit.data.batches import Batch, make_batches
from prunekit.errors import ConfigError, TraceError
from prunekit.graph import CoupledGroup, CouplingGraph, Group
from prunekit.graph.example import trace_batch
from prunekit.importance import Importance
from prunekit.model.updates import name_updates
from prunekit.model.verify import let_others_save
from prunekit.model.weights import check_finite, num_parameters, weights_digest
from prunekit.model.wrappers import unwrap
from prunekit.plan import PruningPlan
from prunekit.policies import Policy, Setting
from prunekit.policies.base import Tools
from prunekit.report.parts import LeftOut, PolicyShares, Ratio, SearchFigures, Target
from prunekit.report.pruning import count_units, gather_left_out, tell_left_out
from prunekit.report.record import Report
from prunekit.runtime.console import say
from prunekit.runtime.stages import Stages
from prunekit.runtime.versions import versions
from prunekit.schedules import Assignment, Schedule, State
from prunekit.schedules.folders import NOWHERE, Folders, activations_folder
from prunekit.schedules.method import Method, compose_pruning
from prunekit.schedules.misfits import find_misfits
from prunekit.surgery import apply_plan, shapes
from prunekit.surgery.finite import check_finite_outputs
from prunekit.surgery.rehearsal import rehearse
from prunekit.surgery.snapshot import Snapshot

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Result(Generic[Model]):
    """What pruning leaves.

    Attributes:
        model: the model, which was changed in place; the one inside wrappers of torch.
        plan: the units that are gone.
        report: the figures of the pruning; `report["ratio"]["achieved"]` reads it as plain JSON.
        graph: the coupled groups that the model was cut by.
        updates: name of a weight → U [out, r] and V [r, in], whose product it holds: what was
            learned beside gates with `importance.train.merge=false`, for `prunekit.recover`.
    """

    model: Model
    plan: PruningPlan
    report: Report
    graph: CouplingGraph
    updates: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)


def prune(
    model: Model,
    *,
    ratio: float | None = None,
    method: str = "slimgpt",
    importance: str | Importance | None = None,
    policy: str | Policy | None = None,
    compensation: str | Compensation | EllipsisType | None = ...,
    schedule: str | Schedule | None = None,
    cost: str | CostModel | None = None,
    calibration: Tensor | Iterable[Batch] | None = None,
    overrides: Sequence[str] = (),
    state: str | Path | None = None,
) -> Result[Model]:
    """Prune a model in place: trace it, choose units, repair the weights that stay, cut.

    Example:
        ```python
        result = prunekit.prune(model, ratio=0.2, method="slimgpt", calibration=tokens)
        prunekit.save_pretrained(result.model, "pruned", tokenizer)
        ```

    Args:
        model: any module that `torch.export` can capture.
        ratio: the share of what `cost` counts that goes, in (0, 1): of all parameters by default;
            None: 0.2, or what the overrides say.
        method: slimgpt, surgeon, best, gates, compresso, sheared, llm_pruner, magnitude or random;
            the next four take the place of its parts.
        importance: tells which units matter least: a name of `conf/importance`, or an object.
        policy: says how much is cut where: a name of `conf/policy`, or an object.
        compensation: repairs what stays: a name of `conf/compensation`, an object, or None for
            none; the method's own where it is left out.
        schedule: who is chosen when: a name of `conf/schedule`, or an object.
        cost: what counts: a name of `conf/cost`, or an object.
        calibration: token ids, int64 [N, T], of a causal language model; or keyword-argument dicts
            of any model's forward call. The first one (two of its sequences) is also what the model
            is traced and checked with.
        overrides: strings as on the command line, e.g. ["importance.heads=diagonal"]; one that
            pruning a model in memory does not act on is an error.
        state: a folder for what a layer-wise run has finished; with "resume=true" among the
            overrides, a run that was broken off goes on from there. Removed at the end.

    Returns:
        The result; `report` holds `method`, `seed`, `versions`, `ratio`, `parameters`, `layers`,
        `seconds`.

    Raises:
        ConfigError: an unknown method or option, an override that would not be acted on, a ratio
            out of range or of reach.
        DataError: calibration data missing, empty, or leading to NaN.
        TraceError: a model that the tracer can't follow, or with nothing to prune.
        SurgeryError: the cut model would not compute what it should; the model is then put back.
    """
    choices = {"importance": importance, "policy": policy, "schedule": schedule, "cost": cost}
    config, backends = compose_pruning(
        cfg.PRUNE,
        method,
        ratio,
        choices,
        compensation,
        overrides,
        keeps_state=state is not None,
    )
    if config.resume and state is None:
        raise ConfigError("resume=true: expected state=FOLDER beside it, got none")
    refuse_vocabulary(config.groups)
    if not isinstance(calibration, Tensor):
        _refuse_batch_size(overrides)
    cfg.import_modules(config.imports)
    device, model = _device_of(model), cast(Model, unwrap(model))
    batches = make_batches(model, calibration, config.data.calibration.batch_size, device)
    folders = Folders(
        state=Path(state) if state else None,
        activations=activations_folder(config, None),
        identity=f"{type(model).__name__} {weights_digest(model)}" if state else "",
    )
    method_of_run = Method.build(config, backends)
    return prune_model(model, config, method_of_run, batches, Stages(device), folders=folders)


def _refuse_batch_size(overrides: Sequence[str]) -> None:
    """Raise ConfigError for a batch size, where the batches themselves were given."""
    for key, value in cfg.split_overrides(overrides):
        if key == "data.calibration.batch_size":
            raise ConfigError(
                f"{key}={value}: expected calibration=… as token ids beside it; batches are taken "
                "as they are"
            )


def prune_model(
    model: Model,
    config: RunConfig,
    method: Method,
    batches: Sequence[Batch],
    stages: Stages,
    *,
    stored: torch.dtype | None = None,
    folders: Folders = NOWHERE,
    streamed: Streamed | None = None,
    graph: CouplingGraph | None = None,
) -> Result[Model]:
    """Trace, allocate, choose and repair, cut: the whole of pruning, in this order.

    Args:
        model: changed in place; on meta where it is streamed.
        config: the run's configuration; its sections that name backends are not read.
        method: the backends.
        batches: keyword arguments of the model's forward call; the first one is the example that
            the model is traced and checked with.
        stages: the clock.
        stored: the type that bytes are counted in; None: that of the weights.
        folders: the run's folders.
        streamed: a model that is cut and written layer by layer; its weights stay on disk.
        graph: what `trace_model` gave of it; None: it is traced now.
    """
    graph = graph or trace_model(
        model, config, method, batches, stages, folders=folders, streamed=streamed
    )
    dense = num_parameters(model)
    with stages("prune"):
        state = folders.open_state(config, graph, batches)
        tools = gather_tools(config, folders, state, stages.device)
        allocation = allocate(model, graph, config, method, batches, stored, tools)
        assignment = replace(allocation.assignment, state=state, store=tools.open_store(""))
        plan = choose_and_cut(assignment, method, folders, streamed)
    report = _report(config, allocation, plan, (dense, model), stages)
    report = report.merge(
        Report(left_out=list_left_out(model, graph, config, method.scope) or None)
    )
    if assignment.store and any(assignment.store.peak.values()):
        report = report.merge(Report(activation_bytes=assignment.store.peak))
    if assignment.state and not folders.keep:
        assignment.state.remove()
    updates = name_updates(model, assignment.adapters)
    return Result(model=model, plan=plan, report=report, graph=graph, updates=updates)


def trace_model(
    model: nn.Module,
    config: RunConfig,
    method: Method,
    batches: Sequence[Batch],
    stages: Stages,
    *,
    folders: Folders = NOWHERE,
    streamed: Streamed | None = None,
) -> CouplingGraph:
    """Trace a model, and mark the groups that can't be cut; arguments as of `prune_model`.

    Raises:
        DataError: weights, or outputs on the first batch, that are not finite.
        TraceError: a model that the tracer can't follow, or with nothing to prune.
        ConfigError: no group of the kinds that the configuration names can be cut.
    """
    with stages("trace"):
        trace = trace_sound if streamed is None else trace_batch
        graph = trace(model, batches[0])
        return rehearse_cut(model, graph, config, method, saved=folders.saves, batch=batches[0])


def trace_sound(model: nn.Module, batch: Batch) -> CouplingGraph:
    """Trace a model whose weights, and outputs on the batch, are finite numbers.

    Raises:
        DataError: some are not.
        TraceError: the model can't be traced with the batch, or does not run on it.
    """
    check_finite(model)
    return trace_batch(model, batch, partial(check_finite_outputs, model))


def rehearse_cut(
    model: nn.Module,
    graph: CouplingGraph,
    config: RunConfig,
    method: Method | None,
    *,
    saved: bool,
    batch: Batch | None = None,
) -> CouplingGraph:
    """Tell and mark which of the groups that the configuration names can't be cut.

    Args:
        model: the model.
        graph: its graph.
        config: names the groups.
        method: what a cut may touch, and whether it takes matrices; None: anything.
        saved: whether the model is to be saved.
        batch: what the graph's example was taken from, if anything.

    Raises:
        ConfigError: none can, `scope.exclude` leaves none, or the importance can't score one.
    """
    scope = method.scope if method else Scope()
    everything = [*graph.groups, *graph.stacks]
    groups = scope.select_groups(choose_groups(model, graph, config.groups), everything)
    if method and (importance := method.importance.at_once):
        importance.expect_groups(graph, groups)
    if method and method.needs_matrices:
        with_weights = [group for group in groups if group.members]
        misfits = find_misfits(model, graph, with_weights, method.compensation)
        if misfits and len(misfits) == len(with_weights):
            _check_repairable(method, model, graph, with_weights)
        graph = _leave_whole(graph, misfits)
        groups = [group for group in groups if graph[group.name].prunable]
    graph = rehearse(model, graph, groups, saved=saved, batch=batch)
    for line in tell_left_out(list_left_out(model, graph, config, scope)):
        say(line)
    return graph


def list_left_out(
    model: nn.Module, graph: CouplingGraph, config: RunConfig, scope: Scope
) -> tuple[LeftOut, ...]:
    """The groups of the kinds that the configuration names which can't be cut."""
    return gather_left_out(
        group for group in list_groups(model, graph, config.groups) if not scope.leaves_whole(group)
    )


def gather_tools(
    config: RunConfig, folders: Folders, state: State | None, device: torch.device
) -> Tools:
    """The tools of a run with these folders and this state, if it keeps one."""
    memory, folder = config.memory, folders.activations

    def open_store(name: str) -> Store:
        own = folder.with_name(f"{folder.name}-{name}") if folder and name else folder
        return Store(device, memory.budget, memory.host, own)

    if state is None:
        return Tools(open_store=open_store)
    return Tools(open_store=open_store, remember=state.remember, keeper=state)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Everything that is settled before units are chosen.

    Attributes:
        assignment: what the schedule works on: the groups that are cut, and the budget.
        groups: the groups that may be cut; those that the policy leaves whole are among them.
        shares: group → the relative share of its units that the policy gives.
        notes: what the policy measured, for the report.
    """

    assignment: Assignment
    groups: Sequence[Group]
    shares: Mapping[str, float]
    notes: Mapping[str, object]


def allocate(
    model: nn.Module,
    graph: CouplingGraph,
    config: RunConfig,
    method: Method,
    batches: Sequence[Batch],
    stored: torch.dtype | None = None,
    tools: Tools | None = None,
) -> Allocation:
    """Spread the target over the groups that the configuration lets be cut.

    Raises:
        ConfigError: a target out of reach; a policy or a repair that doesn't fit the model.
    """
    independent = "independent" in cfg.kinds_of(config.groups)
    method.schedule.check(method.importance, method.scope.rounds, independent)
    everything = [*graph.groups, *graph.stacks]
    groups = method.scope.select_groups(choose_groups(model, graph, config.groups), everything)
    costs = CostSetting(model=model, graph=graph, groups=groups, batches=batches, stored=stored)
    shape = _find_shape(model, graph, config, method, groups)
    objective = set_objective(method.cost, costs, config, shape)
    if method.needs_matrices:
        _check_repairable(method, model, graph, groups)
    setting = _make_setting(costs, objective, config, method, tools or Tools())
    if shape is None:
        shares = _find_shares(setting, config, method)
    else:
        shares = {group.name: shape[group.name] / group.num_units for group in groups}
    cut = [group for group in groups if shares[group.name] > 0] or groups
    assignment = Assignment(
        model=model,
        graph=graph,
        groups=cut,
        budget=_make_budget(setting, objective, config, method, cut, shares, shape),
        batches=batches,
        importance=method.importance,
        compensation=method.compensation,
        rounds=method.scope.rounds,
        protected={group.name: method.scope.protected_units(group) for group in cut},
        independent=independent,
    )
    return Allocation(assignment=assignment, groups=groups, shares=shares, notes=setting.notes)


def _find_shape(
    model: nn.Module,
    graph: CouplingGraph,
    config: RunConfig,
    method: Method,
    groups: Sequence[Group],
) -> dict[str, int] | None:
    """Group → how many of its units go, where `target_shape` says it; else None."""
    if not config.target_shape.given:
        return None
    multiples = find_demands(model, graph, groups, config, method.scope).multiples
    return count_removed(groups, config.target_shape, multiples)


def _make_setting(
    costs: CostSetting, objective: Objective, config: RunConfig, method: Method, tools: Tools
) -> Setting:
    """Gather what the policy may look at."""
    scope, groups = method.scope, costs.groups
    return Setting(
        model=costs.model,
        graph=costs.graph,
        groups=groups,
        batches=costs.batches,
        importance=method.importance,
        cost=objective.cost,
        limit=objective.limit,
        scope=scope,
        demands=find_demands(costs.model, costs.graph, groups, config, scope),
        compensation=method.compensation,
        layerwise=method.schedule.layerwise,
        damping=method.schedule.damping,
        protected={group.name: scope.protected_units(group) for group in groups},
        seed=config.seed,
        tools=tools,
    )


def _find_shares(setting: Setting, config: RunConfig, method: Method) -> dict[str, float]:
    """Group → its relative share; the same for layers that are to keep the same shapes."""
    shares = method.policy.group_shares(setting)
    if config.shapes == "uniform":
        shapes.check_layers_together(setting.groups, setting.graph)
        shares = shapes.average_shares(shares, setting.groups)
    return shares


def _make_budget(
    setting: Setting,
    objective: Objective,
    config: RunConfig,
    method: Method,
    cut: Sequence[Group],
    shares: Mapping[str, float],
    shape: Mapping[str, int] | None,
) -> Budget:
    """Make the budget of the groups that are cut, less the cost of biases that a repair adds.

    Where a shape is given, units compete inside of their groups alone.
    """
    model, graph, limit = setting.model, setting.graph, objective.limit
    repairs = method.compensation
    if repairs is not None and repairs.adds_biases and objective.cost.stored:
        limit -= count_added_biases(model, cut) * objective.cost({}) / graph.num_parameters()
    demands = find_demands(model, graph, cut, config, method.scope)
    slots = make_slots(method.scope, cut, shares, demands)
    return Budget(
        slots=slots,
        cost=objective.cost,
        limit=limit,
        ranking="local" if shape else method.scope.ranking,
        comparable=method.importance.comparable,
        key=objective.option,
        hint=_name_limits(config, method, stepped=max(gather_steps(slots).values()) > 1)
        + suggest_channels(graph.groups, setting.groups),
        asked=None if shape is None else {group.name: shape[group.name] for group in cut},
    )


def choose_and_cut(
    assignment: Assignment, method: Method, folders: Folders, streamed: Streamed | None
) -> PruningPlan:
    """Let the schedule choose and repair, then cut; after a failure the model is put back."""
    model, graph = assignment.model, assignment.graph
    if streamed:
        streamed.write_to(folders.model, resume=bool(assignment.state and assignment.state.there))
        assignment = replace(assignment, layers=streamed.layers(graph))
    snapshot = Snapshot(
        model, everything=assignment.independent, copies=folders.undo and streamed is None
    )
    if assignment.independent:  # all groups change at once
        snapshot.keep(assignment.groups)
    assignment = replace(assignment, snapshot=snapshot)
    try:
        plan = method.schedule.run(assignment)
        if streamed is None:
            apply_plan(model, graph, plan)
        else:
            streamed.complete(graph)
    except BaseException:
        snapshot.restore()
        if assignment.state:
            assignment.state.drop_if_empty()
        raise
    finally:
        if streamed:
            streamed.settle()
    snapshot.note_biases()
    if streamed is None:
        let_others_save(model)
    budget = assignment.budget
    if not any(plan.removed.values()) and budget.limit < budget.cost({}):
        say("nothing was removed: each step of a group removes more than twice what was asked for")
    return plan


def _check_repairable(
    method: Method, model: nn.Module, graph: CouplingGraph, groups: Sequence[Group]
) -> None:
    """Raise ConfigError where a group has no linear consumer whose inputs can be observed."""
    backend = method.schedule if method.compensation is None else method.compensation
    section = "schedule" if method.compensation is None else "compensation"
    kinds = {group.name: group.kind for group in groups}
    for name, error in find_misfits(model, graph, groups, method.compensation).items():
        raise ConfigError(
            f"{section}={type(backend).__name__.lower()}: {error} ({kinds[name]}); "
            "use schedule=oneshot compensation=none"
        ) from error


def _leave_whole(graph: CouplingGraph, reasons: Mapping[str, TraceError]) -> CouplingGraph:
    """The graph with groups that are not to be cut, given the reason for each."""

    def leave(group: CoupledGroup) -> CoupledGroup:
        reason = str(reasons[group.name]).removeprefix(f"{group.name}: ")
        way_out = "schedule=oneshot compensation=none cuts it"
        return replace(group, prunable=False, exact=False, reason=f"{reason}; {way_out}")

    groups = (leave(group) if group.name in reasons else group for group in graph.groups)
    return replace(graph, groups=tuple(groups))


def _name_limits(config: RunConfig, method: Method, stepped: bool) -> str:
    """Name the options that limit how many units can go, or (`stepped`) in which numbers."""
    least = method.scope.min_units
    options = [] if least in (0, 1) else [f"scope.min_units={least}"]
    widths = method.scope.width_multiple
    options += [f"scope.width_multiple={widths}"] if widths else []
    narrow = config.shapes == "uniform" or (config.shapes == "aligned" and stepped and not widths)
    options += [f"shapes={config.shapes}"] if narrow else []
    return f" ({', '.join(options)})" if options else ""


def _report(
    config: RunConfig,
    allocation: Allocation,
    plan: PruningPlan,
    models: tuple[int, nn.Module],
    stages: Stages,
) -> Report:
    """The report of pruning alone, given the size of the dense model and the pruned model."""
    dense, pruned = models
    left = num_parameters(pruned)
    states_target = (
        bool(config.target.given or config.target_shape.given)
        or allocation.assignment.budget.cost.name != "parameters"
    )
    return Report(
        method=config.method_name,
        seed=config.seed,
        versions=versions(),
        ratio=Ratio(target=None if states_target else config.ratio, achieved=1 - left / dense),
        parameters={"dense": dense, "pruned": left},
        target=_count_target(allocation, plan, pruned) if states_target else None,
        policy=describe_policy(allocation),
        steps=gather_steps(allocation.assignment.budget.slots),
        layers=count_units(allocation.groups, plan.removed),
        float64=allocation.assignment.float64 or None,
        seconds=stages.seconds,
        peak_memory_bytes=stages.peak_memory_bytes,
    )


def describe_policy(allocation: Allocation) -> PolicyShares:
    """The shares of the policy, with what it measured."""
    notes = dict(allocation.notes)
    search = notes.pop("search", None)
    assert search is None or isinstance(search, SearchFigures)
    return PolicyShares(shares=allocation.shares, search=search, notes=notes)


def _count_target(allocation: Allocation, plan: PruningPlan, pruned: nn.Module) -> Target:
    """The cost of the dense model and of the pruned model, in the measure of the target."""
    cost, limit = allocation.assignment.budget.cost, allocation.assignment.budget.limit
    exact = round if cost.stored else float
    achieved = cost({name: len(units) for name, units in plan.removed.items()})
    return Target(
        measure=cost.name,
        limit=limit,
        dense=exact(cost({})),
        achieved=exact(achieved),
        measured=cost.remeasure(pruned) if cost.remeasure else None,
    )


def _device_of(model: nn.Module) -> torch.device:
    """The device of a model; an error where it is no model, or has no parameters."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model: expected a torch module, got {model!r}; a folder: prunekit.prune_checkpoint"
        )
    first = next(model.parameters(), None)
    if first is None:
        raise TraceError(f"{type(model).__name__}: it has no parameters to prune")
    return first.device
