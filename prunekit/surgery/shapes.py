"""Shapes: whether layers are cut alike, and to which widths (`shapes=aligned|free|uniform`)."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

from torch import nn

from prunekit.errors import CheckpointError, ConfigError, SurgeryError
from prunekit.graph import CouplingGraph, Group
from prunekit.graph.capture import meta_copy
from prunekit.graph.groups import sort_by_likeness
from prunekit.model.inputs import text_config
from prunekit.model.verify import required_record
from prunekit.plan import PruningPlan
from prunekit.surgery.apply import apply_plan
from prunekit.surgery.cut import cut_layer
from prunekit.surgery.sizes import HEADS

# Widths are multiples of the largest of these that is at most a `FINENESS`-th of the dense width.
# Kernels have nothing from a smaller one: 8 numbers in half precision are the 16 bytes they load.
_STEPS = (128, 64, 32, 16, 8)
FINENESS = 16
# A class may refuse some numbers of units of these kinds, so that each number is tried. For other
# kinds one number stands for all.
_COUNTED = (*HEADS, "expert")


def choose_step(width: int, fineness: int = FINENESS) -> int:
    """The number that divides the widths to which a dense width is cut; 1 for a narrow one."""
    return next((step for step in _STEPS if step * fineness <= width), 1)


def find_steps(groups: Sequence[Group], uniform: bool = False) -> dict[str, int]:
    """Group → the number that should divide its kept units, so that its width suits kernels.

    The width is the narrowest that its units make in any matrix, or that of one head. Where FFNs
    are `uniform`, a step is taken in all layers at once: it is a quarter of what it could be.

    Returns:
        Name of a group → the number; heads and experts, which are counted, are left out.
    """
    steps = {}
    for group in groups:
        if group.sets_width and group.kind not in HEADS:
            unit = min(_unit_widths(group, groups))
            finer = 4 if uniform and group.kind == "mlp" else 1
            step = choose_step(group.num_units * unit, finer * FINENESS)
            steps[group.name] = step // math.gcd(step, unit)
    return steps


def find_multiples(groups: Sequence[Group], to: int) -> dict[str, int]:
    """Group → the number that must divide its kept units, so that `to` divides each matrix's width.

    Where the heads' width is what is cut, `to` divides the width of each head.

    Returns:
        Name of a group → the multiple; groups whose units are counted and set no width are left
        out.
    """
    multiples = {}
    for group in groups:
        if group.sets_width:
            # A unit owns `width` positions: `to` / gcd units fill a multiple of `to`.
            widths = _unit_widths(group, groups)
            multiples[group.name] = math.lcm(*(to // math.gcd(to, width) for width in widths))
    return multiples


def find_needed_multiples(model: nn.Module, groups: Sequence[Group]) -> dict[str, int]:
    """Group → the number that must divide its kept units for the model to run.

    Some modules ask for one, and kernels: the grouped matrix products of stacked experts
    [experts, rows, columns] take rows of whole 16 bytes, 8 numbers in half precision, which a model
    in float32 may be stored in too.
    """
    whole = {
        name: max(16 // min(parameter.element_size(), 2), 1)
        for name, parameter in model.named_parameters()
    }
    multiples = {}
    for group in groups:
        members = group.members if group.kind != "expert" else ()
        rows = [whole[m.parameter] for m in members if m.stacked and m.dim > 0]
        # Rotary positions lie behind latents in memory, pairs of which are read as complex numbers.
        pair = 2 if group.kind == "latent" else 1
        multiples[group.name] = math.lcm(group.multiple, pair, *rows)
    return multiples


def _unit_widths(group: Group, groups: Sequence[Group]) -> set[int]:
    """How many positions a unit of a group owns in each matrix, or in one head."""
    if group.kind == "head_dim":
        # A pair of rotary channels is two positions, which two units of the values go with.
        widest = max(other.num_units for other in groups if other.kind == "head_dim")
        return {widest // group.num_units}
    return {member.index.shape[1] for member in group.members}


def average_shares(shares: Mapping[str, float], groups: Sequence[Group]) -> dict[str, float]:
    """Give groups that differ in nothing but their layer the mean of their shares."""
    means = {
        likeness: sum(shares[group.name] for group in alike) / len(alike)
        for likeness, alike in sort_by_likeness(groups).items()
    }
    return {group.name: means[group.likeness] for group in groups}


def check_layers_together(groups: Sequence[Group], graph: CouplingGraph) -> None:
    """Check that no group stays whole whose likes in other layers are cut.

    Raises:
        ConfigError: there is such a group; the message names it and tells why it stays.
    """
    names = {group.name for group in groups}
    cut = {group.likeness for group in groups}
    for group in graph.groups:
        if group.layer is not None and group.name not in names and group.likeness in cut:
            raise ConfigError(
                f"shapes=uniform: {group.name} stays whole ({group.reason or 'scope.exclude'}), "
                "others like it don't"
            )


def find_stock_counts(
    model: nn.Module, graph: CouplingGraph, groups: Sequence[Group]
) -> dict[str, Container[int]]:
    """Find how many units may stay for the model's own class to hold the result.

    They are found by trying, on a copy without weights: some configs refuse numbers of heads that
    don't divide the hidden size, some classes derive the width of heads from their number.

    Returns:
        Name of a group → the numbers of units that may stay in it and in all groups like it. A
        group that is missing may keep any number.

    Raises:
        ConfigError: the class can hold the dense model only, or groups are cut whose numbers a
            class may refuse in combination.
    """
    if len({group.kind for group in groups} & {"channel", "head_dim", *HEADS}) > 1:
        raise ConfigError(
            "shapes=uniform: expected heads, their width or channels to be cut, got more than one "
            "of them: whether the model's own class holds the result can't be told before"
        )
    counts: dict[str, Container[int]] = {}
    for alike in sort_by_likeness(groups).values():
        # Without members, as in a stack of layers, no shape changes: every number will do.
        if alike[0].members and hasattr(model, "config"):
            possible = _possible_counts(model, graph, alike)
            counts.update({group.name: possible for group in alike})
    if counts and not any(counts.values()):
        raise ConfigError(
            "shapes=uniform: the model's own class can hold no number of units "
            "but the dense model's"
        )
    return counts


def _possible_counts(
    model: nn.Module, graph: CouplingGraph, alike: Sequence[Group]
) -> Container[int]:
    """The numbers below `num_units` with which the model's own class builds the cut model."""
    n, kind = alike[0].num_units, alike[0].kind
    if kind in _COUNTED:
        return {kept for kept in range(1, n) if _is_stock(model, graph, alike, kept)}
    # A config may want the number of heads to divide the width of the residual stream.
    heads = getattr(text_config(model), "num_attention_heads", None)
    step = int(heads or 1) if kind == "channel" else 1
    half = n // 2 // step * step
    return range(step, n, step) if half and _is_stock(model, graph, alike, half) else set()


def _is_stock(model: nn.Module, graph: CouplingGraph, groups: Sequence[Group], kept: int) -> bool:
    """Whether the model's class would build the cut model from its config alone.

    `kept` is the number of units that stay in each of the groups.
    """
    skeleton = meta_copy(model, parameters_only=True)  # the numbers in tables are compared
    removed = {group.name: list(range(kept, group.num_units)) for group in groups}
    try:
        if any(group.layer is None for group in groups):
            apply_plan(skeleton, graph, PruningPlan(removed))
        else:
            for name, units in removed.items():
                cut_layer(skeleton, graph, {name: units})
        return required_record(skeleton) is None
    except (CheckpointError, SurgeryError):
        return False
