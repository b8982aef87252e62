"""What is demanded of a cut: units that must stay, widths that kernels can run or run fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from prunekit.allocation.scope import Scope
from prunekit.allocation.slots import Demands
from prunekit.config import RunConfig
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group
from prunekit.model.names import experts_per_token
from prunekit.surgery import shapes
from prunekit.surgery.sizes import HEADS
from prunekit.surgery.whole import find_obstacles

SHARED = ("attention", "mlp")  # kinds whose units devices share out: tensor parallelism


def find_demands(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    config: RunConfig,
    scope: Scope,
) -> Demands:
    """What the model, and the options of widths and heads, demand of a cut of these groups.

    Raises:
        ConfigError: shapes=uniform, and no uniform cut that the model's own class can hold; a kind
            of group may lose more than a group of it can; or devices can't share a group out.
    """
    _expect_shareable(groups, scope.tensor_parallel)
    uniform = config.shapes == "uniform"
    free = config.shapes == "free" or scope.width_multiple is not None
    return Demands(
        floors=_find_floors(model, graph, groups, scope, uniform),
        multiples=_find_multiples(model, groups, scope),
        steps={} if free else shapes.find_steps(groups, uniform),
        possible=shapes.find_stock_counts(model, graph, groups) if uniform else {},
        uniform=uniform,
    )


def _expect_shareable(groups: Sequence[Group], devices: int) -> None:
    """Raise ConfigError where devices could share no cut of a group out, nor the whole group.

    A layer may keep all of its units. Heads that are fewer than the devices lie on several.
    """
    for group in groups:
        units = group.num_units
        if group.kind in SHARED and units % devices and devices % units:
            raise ConfigError(
                f"tensor_parallel={devices}: {group.name} has {units} units, expected a multiple "
                f"of {devices}; ask for fewer devices"
            )


def _find_floors(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    scope: Scope,
    uniform: bool,
) -> dict[str, int]:
    """Group → how many units must stay, if not one: as many experts as a token is sent to, and none
    where the scope lets a group lose everything that can.
    """
    needed = experts_per_token(getattr(model, "config", None)) or 1
    floors = {
        group.name: group.fewest if group.fewest > 1 else needed
        for group in groups
        if group.kind == "expert"
    }
    for name, least in floors.items():
        _expect_possible(scope, "expert", least, f"{name} sends each token to {least}")
    free = [group for group in groups if not scope.fewest(group) and group.name not in floors]
    reasons = find_obstacles(model, graph, free) if free and not uniform else {}
    for group in free:
        reason = "shapes=uniform" if uniform else reasons.get(group.name)
        if reason is None:
            floors[group.name] = 0
        else:
            why = f"{group.name} can't lose all of its units: {reason}"
            _expect_possible(scope, group.kind, 1, why)
    return floors


def _expect_possible(scope: Scope, kind: str, least: int, why: str) -> None:
    """Raise ConfigError where the scope asks by name for fewer units of a kind than must stay."""
    if isinstance(scope.min_units, Mapping) and (asked := scope.min_units.get(kind, least)) < least:
        raise ConfigError(f"scope.min_units.{kind}: expected at least {least}, got {asked}: {why}")


def _find_multiples(model: nn.Module, groups: Sequence[Group], scope: Scope) -> dict[str, int]:
    """Group → the number that divides the number of its kept units.

    The scope asks for some, kernels and modules for others.
    """
    multiples = shapes.find_multiples(groups, scope.width_multiple or 1)
    needed = shapes.find_needed_multiples(model, groups)
    for group in groups:
        if group.kind in HEADS:
            multiples[group.name] = math.lcm(multiples[group.name], scope.head_multiple)
        if group.kind in SHARED:
            multiples[group.name] = math.lcm(multiples[group.name], scope.tensor_parallel)
        multiples[group.name] = math.lcm(multiples.get(group.name, 1), needed[group.name])
    return multiples


def count_added_biases(model: nn.Module, groups: Sequence[Group]) -> int:
    """How many parameters a repair adds where it gives a bias to every consumer that has none."""
    sizes = {}
    for member in (member for group in groups for member in group.consumers):
        module = model.get_submodule(member.parameter.rpartition(".")[0])
        if getattr(module, "bias", None) is None:
            sizes[member.parameter] = model.get_parameter(member.parameter).shape[1 - member.dim]
    return sum(sizes.values())
