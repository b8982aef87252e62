"""Seconds of a forward pass: layers are cut to some widths and timed, the whole model is the scale.

Each group gets a table, and the tables add up: what one group gains is taken not to depend on what
is left of the others. They are scaled so that the sum is what the whole model takes, both dense and
with every group at its narrowest.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from prunekit.allocation.costs.base import Cost, CostSetting, Term
from prunekit.allocation.costs.curves import Curve, fit_isotonic, spread_widths
from prunekit.allocation.costs.forward import ForwardCost
from prunekit.allocation.costs.timing import (
    Arguments,
    Inputs,
    fill_skeleton,
    median_seconds,
    move_inputs,
    record_calls,
    time_model,
)
from prunekit.errors import ConfigError, SurgeryError
from prunekit.graph import CouplingGraph, Group
from prunekit.graph.capture import meta_copy
from prunekit.model.inputs import without_cache
from prunekit.model.stack import place_in_stack
from prunekit.plan import PruningPlan
from prunekit.runtime.console import say, track
from prunekit.runtime.memory import out_of_memory
from prunekit.runtime.modes import at_rest
from prunekit.surgery import apply_plan


@dataclass(frozen=True, kw_only=True)
class Latency(ForwardCost):
    """Seconds of one forward pass, measured on the device that the model is on.

    `widths`: numbers of units that each class of equal groups is measured at, the dense one
    included; `repeats`: timings at each width, of which the median counts.
    """

    name: ClassVar[str] = "latency"
    measures: ClassVar[bool] = True
    widths: int = 5
    repeats: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value, least in (("widths", self.widths, 2), ("repeats", self.repeats, 1)):
            if type(value) is not int or value < least:
                raise ConfigError(f"cost.{key}: expected a whole number ≥ {least}, got {value}")

    def measure(self, setting: CostSetting) -> Cost:
        """Time the layers of the groups; the cut model is timed whole at the end."""
        example = self.example(setting)
        return latency_cost(
            setting.model, setting.graph, setting.groups, example, self.widths, self.repeats
        )


def latency_cost(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    example: Inputs,
    widths: int = 5,
    repeats: int = 5,
) -> Cost:
    """Seconds of one forward pass on `example`: a table per group, and a constant.

    The layer that a group lies in (the whole model where it lies in none) is timed alone, cut to
    each of `widths` numbers of units and given the inputs that it gets in the dense model. Between
    them the seconds are interpolated, and they never rise as units go. Groups whose layers have
    equal shapes are measured once. Below the narrowest width that could be cut nothing is gained.

    Args:
        model: on its device, with its weights; left as it is.
        graph: its groups.
        groups: those that may be pruned.
        example: the inputs of one forward call.
        widths: numbers of units to measure each class of groups at, the dense one included.
        repeats: timings at each width; their median counts.
    """
    inputs = without_cache(model, example)
    device = next(model.parameters()).device
    classes: dict[Hashable, list[Group]] = {}
    for group in groups:
        classes.setdefault(_likeness(model, group), []).append(group)
    places = {_place(model, alike[0]) for alike in classes.values()}
    with at_rest(model):
        calls = record_calls(model, places, move_inputs(inputs, device))
        watch = Stopwatch(model, graph, calls, device, repeats)
        curves: dict[str, Curve] = {}
        for alike in track(classes.values(), "Timing layers", len(classes)):
            curves |= dict.fromkeys((g.name for g in alike), watch.measure_curve(alike[0], widths))
        total = median_seconds(lambda: calls[""](model), device, repeats)
        least = watch.seconds("", {name: curve.kept[0] for name, curve in curves.items()})
    gains = math.fsum(curve.gain for curve in curves.values())
    share = _share(total, least, gains)
    return Cost(
        name=Latency.name,
        unit="seconds",
        terms=(Term(coefficient=total - share * gains, sizes=(), cuts=()),),
        tables={
            name: tuple(share * seconds for seconds in curve.table())
            for name, curve in curves.items()
        },
        remeasure=partial(time_model, example=example),
    )


def _share(total: float, least: float | None, gains: float) -> float:
    """The share of the gains, measured layer by layer, that the whole model has.

    Where the narrowest model could not be measured (`least` is None), it is the largest share that
    is possible.
    """
    if not gains:
        return 0.0
    return min(1.0, total / gains) if least is None else max(total - least, 0.0) / gains


@dataclass(frozen=True)
class Stopwatch:
    """Times the layer of a group, or the whole model, cut to a number of units."""

    model: nn.Module
    graph: CouplingGraph
    calls: Mapping[str, Arguments]
    device: torch.device
    repeats: int

    def measure_curve(self, group: Group, widths: int) -> Curve:
        """The seconds of the layer of a group at some widths.

        They are the whole model's where the layer, cut, does not run on its recorded arguments.
        """
        for place in dict.fromkeys((_place(self.model, group), "")):
            measured = {
                units: self.seconds(place, {group.name: units})
                for units in spread_widths(group.num_units, widths, none=not group.must_stay)
            }
            points = {units: seconds for units, seconds in measured.items() if seconds is not None}
            if len(points) > 1 and group.num_units in points:
                return Curve(list(points), fit_isotonic(list(points.values())))
        say(f"{group.name}: can't be timed at fewer units: cutting it counts as no gain")
        return Curve([group.num_units], [0.0])

    def seconds(self, place: str, kept: Mapping[str, int]) -> float | None:
        """Seconds of one call of the module at `place`, with `kept` units of the groups left.

        None where the model can't be cut to these units, or the module can't be run alone.
        """
        skeleton = meta_copy(self.model).eval()
        plan = PruningPlan(
            {name: range(units, self.graph[name].num_units) for name, units in kept.items()}
        )
        try:
            apply_plan(skeleton, self.graph, plan)
        except SurgeryError:
            return None
        module = fill_skeleton(skeleton.get_submodule(place), self.model.get_submodule(place))
        try:
            return median_seconds(lambda: self.calls[place](module), self.device, self.repeats)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if out_of_memory(error):
                raise
            return None  # the recorded arguments are the dense model's: they may not fit


def _place(model: nn.Module, group: Group) -> str:
    """Path of the layer that a group lies in; empty, the whole model, where it lies in none."""
    place = place_in_stack(model, group.module)
    return "" if place is None else f"{place[0]}.{place[1]}".lstrip(".")


def _likeness(model: nn.Module, group: Group) -> Hashable:
    """Equal for groups that cut equal layers equally."""
    place = _place(model, group)
    if not place:
        return group.name
    layer = model.get_submodule(place)
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    members = tuple(
        (m.parameter.removeprefix(place), m.dim, tuple(m.index.shape)) for m in group.members
    )
    return type(layer), group.kind, group.num_units, shapes, members
