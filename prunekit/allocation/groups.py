"""The groups that a configuration chooses to cut."""

from __future__ import annotations

from typing import Any

from prunekit import config as cfg
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group


def chosen_groups(graph: CouplingGraph, choice: Any) -> list[Group]:
    """The prunable groups of the kinds a choice (one or a list) names; each kind must have one.

    For `block` of a model without any, every exact group.
    """
    found: list[Group] = []
    prunable: list[Group] = [group for group in (*graph.groups, *graph.stacks) if group.prunable]
    for name in cfg.kinds_of(choice):
        groups: list[Group] = [group for group in prunable if group.kind in cfg.KINDS[name]]
        if not groups and name == "block":
            groups = [group for group in graph.groups if group.prunable and group.exact]
        if not groups:
            kinds = ", ".join(sorted({group.kind for group in prunable})) or "none"
            raise ConfigError(
                f"groups={name}: the model has no prunable group of that kind; it has: {kinds}"
            )
        found += [group for group in groups if group not in found]
    return found
