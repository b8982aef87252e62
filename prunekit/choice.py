"""Everything that is settled before units are chosen: which groups, who chooses, how much goes where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from prunekit import config as cfg
from prunekit import shapes
from prunekit.compensation.apply import Bias
from prunekit.compensation.walk import consumers_of
from prunekit.config import RunConfig
from prunekit.errors import ConfigError, TraceError
from prunekit.graph import CoupledGroup, CouplingGraph
from prunekit.policies import Budget, Cost, Policy, Scope, Setting, weights_cost
from prunekit.schedules import Layerwise, Schedule, Task


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
        check_repairable(f"schedule={name}" if compensation is None else f"compensation={name}", model, groups)
    shares = policy.group_shares(setting)
    uniform = config.shapes == "uniform"
    if uniform:
        shapes.check_all_there(groups, graph)
        shares = shapes.shared(shares, groups)
    cut = [group for group in groups if shares[group.name] > 0] or groups
    if isinstance(compensation, Bias) and cost.name in ("parameters", "bytes"):
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
        key=f"target.{config.target.name}" if config.target.name else "ratio",
        hint=_hint(config, scope),
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


def check_repairable(option: str, model: nn.Module, groups: Sequence[CoupledGroup]) -> None:
    """Raise ConfigError where groups have no linear consumers whose inputs could be looked at."""
    for group in groups:
        try:
            consumers_of(model, group)
        except TraceError as error:
            raise ConfigError(f"{option}: {error} ({group.kind}); use schedule=oneshot compensation=none") from error


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


def multiples(model: nn.Module, groups: Sequence[CoupledGroup], config: RunConfig, scope: Scope) -> dict[str, int]:
    """What a group's kept units must be a multiple of: rows of stacked experts' weights go in 16 bytes, in bf16 too."""
    stacked = {
        name: max(16 // min(parameter.element_size(), 2), 1)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not isinstance(model.get_submodule(name.rpartition(".")[0]), _ConvNd)
    }
    aligned = scope.width_multiple if scope.width_multiple > 1 else shapes.ALIGNMENT
    found = shapes.alignments(groups, aligned) if config.shapes == "aligned" else {}
    for group in groups:
        for member in group.members if group.kind != "expert" else ():
            if member.parameter in stacked and member.dim > 0:
                found[group.name] = math.lcm(found.get(group.name, 1), stacked[member.parameter])
    return found


def added_biases(model: nn.Module, groups: Sequence[CoupledGroup]) -> int:
    """How many parameters the biases have that consumers lack."""
    found = {}
    for member in (member for group in groups for member in group.consumers):
        module = model.get_submodule(member.parameter.rpartition(".")[0])
        if getattr(module, "bias", None) is None:
            found[member.parameter] = model.get_parameter(member.parameter).shape[1 - member.dim]
    return sum(found.values())


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


def _hint(config: RunConfig, scope: Scope) -> str:
    """Which options narrow what can go, for messages."""
    found = [f"scope.min_units={scope.min_units}"] if scope.min_units != 1 else []
    found += [f"shapes={config.shapes}"] if config.shapes != "free" else []
    return f" ({', '.join(found)})" if found else ""
