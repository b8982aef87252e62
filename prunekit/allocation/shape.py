"""A shape as the budget: how many layers, heads, FFN channels and hidden channels stay.

This is the target of Xia et al. 2023 (arXiv 2310.06694): every layer comes down to the same
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunekit.config import SHAPE_KINDS, ShapeConfig
from prunekit.errors import ConfigError
from prunekit.graph import Group


def count_removed(
    groups: Sequence[Group], shape: ShapeConfig, multiples: Mapping[str, int]
) -> dict[str, int]:
    """Group → how many of its units go, so that it keeps as many as the shape says.

    Groups of kinds that the shape doesn't name stay whole.

    Args:
        groups: the groups that may be cut.
        shape: the numbers that stay.
        multiples: group → what divides the number of units that stay.

    Raises:
        ConfigError: a number without a group of its kind; more units than a group has, or a number
            of them that the model can't have; nothing that goes.
    """
    removed = dict.fromkeys((group.name for group in groups), 0)
    for key, kept in shape.given.items():
        kind = SHAPE_KINDS[key]
        own = [group for group in groups if group.kind == kind]
        if not own:
            found = ", ".join(sorted({group.kind for group in groups}))
            raise ConfigError(f"target_shape.{key}: expected {kind} among groups=[{found}]")
        for group in own:
            least, multiple = group.fewest, multiples.get(group.name, 1)
            if not least <= kept <= group.num_units:
                raise ConfigError(
                    f"target_shape.{key}: {group.name} has {group.num_units} units, expected a "
                    f"number from {least} to that, got {kept}"
                )
            if kept % multiple and kept != group.num_units:
                raise ConfigError(
                    f"target_shape.{key}: {group.name} keeps a multiple of {multiple} units, got "
                    f"{kept}"
                )
            removed[group.name] = group.num_units - kept
    if not any(removed.values()):
        raise ConfigError("target_shape: expected fewer units of some kind than the model has")
    return removed
