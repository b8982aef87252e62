"""Shapes: whether layers are cut alike, and to which widths (`shapes=free|uniform|aligned`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Hashable, Mapping, Sequence
from typing import Any

from torch import nn

from prunekit.errors import CheckpointError, ConfigError, SurgeryError
from prunekit.graph import CouplingGraph, Group
from prunekit.model.verify import required_record
from prunekit.plan import PruningPlan
from prunekit.surgery.apply import apply_plan
from prunekit.surgery.cut import cut_layer

ALIGNMENT = 64  # what `shapes=aligned` makes widths multiples of, unless `scope.width_multiple` says otherwise
_HEADS = ("attention", "query_head")
_COUNTED = (*_HEADS, "expert")  # kinds whose numbers a class may refuse one by one


def alignments(groups: Sequence[Group], to: int) -> dict[str, int]:
    """Group → what its kept units must be a multiple of so that each of its sides is a multiple of
    `to`.
    """
    found = {}
    for group in groups:
        if group.sets_width:
            widths = {member.index.shape[1] for member in group.members}
            found[group.name] = math.lcm(*(to // math.gcd(to, width) for width in widths))
    return found


def shared(shares: Mapping[str, float], groups: Sequence[Group]) -> dict[str, float]:
    """The policy's shares, with the mean of them for groups that are alike but for their layer."""
    classes = _classes(groups)
    means = {
        key: sum(shares[group.name] for group in members) / len(members)
        for key, members in classes.items()
    }
    return {group.name: means[group.likeness] for group in groups}


def check_all_there(groups: Sequence[Group], graph: CouplingGraph) -> None:
    """Raise ConfigError where a group is left alone whose likes in other layers are cut."""
    names, classes = {group.name for group in groups}, _classes(groups)
    for group in graph.groups:
        if group.layer is not None and group.name not in names and group.likeness in classes:
            raise ConfigError(
                f"shapes=uniform: {group.name} stays whole ({group.reason or 'scope.exclude'}), others like it don't"
            )


def stock_counts(
    model: nn.Module, graph: CouplingGraph, groups: Sequence[Group]
) -> dict[str, Container[int]]:
    """Group → how many units may stay in it, and in all like it, so that the model's own class can
    hold the result.

    Found by trying, on a copy without weights: some configs refuse numbers of heads that don't
    divide the hidden size, some classes derive the heads' width from their number.
    """
    if len({group.kind for group in groups} & {"channel", "head_dim", *_HEADS}) > 1:
        raise ConfigError(
            "shapes=uniform: expected heads, their width or channels to be cut, got more than one of them: whether the "
            "model's own class holds the result can't be told before"
        )
    found: dict[str, Container[int]] = {}
    for members in _classes(groups).values():
        n, kind = members[0].num_units, members[0].kind
        if not members[0].members or not hasattr(model, "config"):
            continue
        each = kind in _COUNTED
        step = _heads(model) if kind == "channel" else 1  # which many a config wants to divide them
        tried = range(1, n) if each else (n // 2 // step * step,)
        fitting = {kept for kept in tried if kept and _is_stock(model, graph, members, kept)}
        possible: Container[int] = range(0, n, step) if fitting and not each else fitting
        found |= {group.name: possible for group in members}
    if found and not any(found.values()):
        raise ConfigError(
            "shapes=uniform: the model's own class can hold no number of units but the dense model's"
        )
    return found


def _is_stock(model: nn.Module, graph: CouplingGraph, groups: Sequence[Group], kept: int) -> bool:
    """Whether the class of the model would build it from its config alone with `kept` units in each
    of the groups.
    """
    memo = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    skeleton = copy.deepcopy(model, memo)
    try:
        gone = {group.name: list(range(kept, group.num_units)) for group in groups}
        if any(group.layer is None for group in groups):
            apply_plan(skeleton, graph, PruningPlan(gone))
        else:
            for name, units in gone.items():
                cut_layer(skeleton, graph, {name: units})
        return required_record(skeleton) is None
    except (CheckpointError, SurgeryError):
        return False


def _heads(model: nn.Module) -> int:
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(config, "num_attention_heads", None) or 1)


def _classes(groups: Sequence[Group]) -> dict[Hashable, list[Group]]:
    found: dict[Hashable, list[Group]] = {}
    for group in groups:
        found.setdefault(group.likeness, []).append(group)
    return found
