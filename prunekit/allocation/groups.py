"""The groups that a configuration chooses to cut, by what their units are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from prunekit import config as cfg
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group
from prunekit.model.parts import find_language_part


def choose_groups(
    model: nn.Module, graph: CouplingGraph, choice: str | list[str] | tuple[str, ...]
) -> list[Group]:
    """The prunable groups of the kinds that the option `groups` names, one or a list.

    In a model that also sees or hears they are those of the language model; `tower` means the
    attention and the FFNs beside it. For `block` they are all exact groups where the model has
    neither attention nor FFNs; for `auto` FFNs and channels where it has no attention.

    Raises:
        ConfigError: the model has no group of a kind that is named.
    """
    chosen: list[Group] = []
    for name in cfg.kinds_of(choice):
        groups = _groups_of_kind(_part_named(model, graph, name), name)
        chosen += [group for group in groups if group not in chosen]
    return chosen


def _part_named(model: nn.Module, graph: CouplingGraph, name: str) -> list[Group]:
    """The groups of the language model, or of what lies beside it where `tower` is named."""
    everything: list[Group] = [*graph.groups, *graph.stacks]
    part = find_language_part(model)
    beside = [group for group in everything if part is not None and _lies_beside(group, part)]
    if name == "tower":
        return beside
    return [group for group in everything if group not in beside]


def _lies_beside(group: Group, part: str) -> bool:
    """Whether nothing of a group lies in the part of the model at a path."""
    places = [member.parameter for member in group.members] or [f"{group.module}."]
    return not any(place.startswith(f"{part}.") for place in places)


def _kinds_named(part: Sequence[Group], name: str) -> tuple[str, ...]:
    """The kinds that a choice of `groups` stands for in this part of a model."""
    if name == "auto" and not any(group.kind == "attention" for group in part):
        return "mlp", "channel"
    return cfg.KINDS[name]


def _groups_of_kind(part: Sequence[Group], name: str) -> list[Group]:
    kinds = _kinds_named(part, name)
    prunable = [group for group in part if group.prunable]
    groups = [group for group in prunable if group.kind in kinds]
    unprunable = [group for group in part if group.kind in kinds and not group.prunable]
    exact = [group for group in prunable if group.members and group.exact]
    if name == "auto":
        groups = [group for group in groups if group in exact] or groups
    if not groups and name == "block" and not unprunable:
        groups = exact
    if not groups:
        if not unprunable and name == "block":  # the largest stands for them all
            whole = [group for group in part if group.members and not group.prunable]
            unprunable = sorted(whole, key=lambda g: -g.num_units * g.parameters_per_unit)
        found = ", ".join(sorted({group.kind for group in prunable})) or "none"
        where = "beside a language model" if name == "tower" else "of that kind"
        why = f" ({unprunable[0].name}: {unprunable[0].reason})" if unprunable else ""
        hint = suggest_channels(prunable, groups)
        raise ConfigError(
            f"groups={name}: the model has no prunable group {where}{why}; it has: {found}{hint}"
        )
    return groups


def suggest_channels(every: Sequence[Group], chosen: Sequence[Group]) -> str:
    """A hint at the channels of a network without attention; empty where that is no matter."""
    kinds = {group.kind for group in every if group.prunable}
    if "attention" in kinds or "channel" not in kinds - {group.kind for group in chosen}:
        return ""
    return "; groups=channel cuts the channels of the network, groups=auto these and its FFNs"


def refuse_vocabulary(choice: str | list[str] | tuple[str, ...]) -> None:
    """Raise ConfigError where `groups` names tokens: no group of the graph is meant by it."""
    if cfg.VOCABULARY in cfg.kinds_of(choice):
        raise ConfigError(
            "groups=vocabulary: tokens go by texts, which need the tokenizer: call "
            "prunekit.prune_vocabulary(model, tokenizer, texts) before, or use task=prune"
        )


def list_groups(
    model: nn.Module, graph: CouplingGraph, choice: str | list[str] | tuple[str, ...]
) -> list[Group]:
    """The groups of the kinds that the option `groups` names, whether they can be pruned or not."""
    found: list[Group] = []
    for name in cfg.kinds_of(choice):
        part = _part_named(model, graph, name)
        kinds = _kinds_named(part, name)
        found += [group for group in part if group.kind in kinds and group not in found]
    return found
