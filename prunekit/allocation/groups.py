"""The groups that a configuration chooses to cut, by what their units are."""

from __future__ import annotations

from prunekit import config as cfg
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group


def choose_groups(graph: CouplingGraph, choice: str | list[str] | tuple[str, ...]) -> list[Group]:
    """The prunable groups of the kinds that the option `groups` names, one or a list.

    For `block` they are all exact groups where the model has neither attention nor FFNs.

    Raises:
        ConfigError: the model has no group of a kind that is named.
    """
    chosen: list[Group] = []
    for name in cfg.kinds_of(choice):
        groups = _groups_of_kind(graph, name)
        chosen += [group for group in groups if group not in chosen]
    return chosen


def _groups_of_kind(graph: CouplingGraph, name: str) -> list[Group]:
    prunable: list[Group] = [group for group in (*graph.groups, *graph.stacks) if group.prunable]
    groups = [group for group in prunable if group.kind in cfg.KINDS[name]]
    unprunable = find_unprunable(graph, name)
    if not groups and name == "block" and not unprunable:
        groups = [group for group in graph.groups if group.prunable and group.exact]
    if not groups:
        kinds = ", ".join(sorted({group.kind for group in prunable})) or "none"
        why = f" ({unprunable[0].name}: {unprunable[0].reason})" if unprunable else ""
        raise ConfigError(
            f"groups={name}: the model has no prunable group of that kind{why}; it has: {kinds}"
        )
    return groups


def refuse_vocabulary(choice: str | list[str] | tuple[str, ...]) -> None:
    """Raise ConfigError where `groups` names tokens: no group of the graph is meant by it."""
    if cfg.VOCABULARY in cfg.kinds_of(choice):
        raise ConfigError(
            "groups=vocabulary: tokens go by texts, which need the tokenizer: call "
            "prunekit.prune_vocabulary(model, tokenizer, texts) before, or use task=prune"
        )


def find_unprunable(graph: CouplingGraph, choice: str | list[str] | tuple[str, ...]) -> list[Group]:
    """The groups of the kinds that the option `groups` names which can't be pruned."""
    kinds = {kind for name in cfg.kinds_of(choice) for kind in cfg.KINDS[name]}
    everything: list[Group] = [*graph.groups, *graph.stacks]
    return [group for group in everything if group.kind in kinds and not group.prunable]
