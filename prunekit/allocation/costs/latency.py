"""Seconds of a forward pass: layers cut to some widths and timed, the whole model as the yardstick."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from prunekit.allocation.costs.base import Cost, Term
from prunekit.allocation.costs.timing import Call, Inputs, filled, median_seconds, moved, record
from prunekit.errors import SurgeryError
from prunekit.graph import CouplingGraph, Group
from prunekit.graph.capture import meta_copy
from prunekit.model.inputs import without_cache
from prunekit.plan import PruningPlan
from prunekit.runtime.console import say, track
from prunekit.runtime.modes import at_rest
from prunekit.surgery.check import apply_plan

_ALIGNMENT = (
    64  # widths are measured at multiples of up to this: odd ones run slower than those around them
)


def latency_cost(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    example: Inputs,
    widths: int = 5,
    repeats: int = 5,
) -> Cost:
    """Seconds of one forward pass on `example`, measured on the model's device: a table per group,
    and a constant.

    A group's layer (the whole model where it lies in none) is timed alone, cut to each of `widths`
    numbers of units and given the inputs it gets in the dense model; in between the seconds are
    interpolated, and they never rise as units go. Groups whose layers have equal shapes are
    measured once. Below the narrowest width that could be cut nothing is gained. The tables add up,
    what one group gains taken not to depend on what is left of the others, and are scaled so that
    the sum is what the whole model takes both dense and with every group at its narrowest.

    Args:
        model: on its device, with its weights; left as it is.
        graph: its groups.
        groups: those that may be pruned.
        example: the inputs of one forward call.
        widths: numbers of units to measure each class of groups at, the dense one included.
        repeats: timings at each width; their median counts.
    """
    example = without_cache(model, example)
    device = next(model.parameters()).device
    alike: dict[Any, list[Group]] = {}
    for group in groups:
        alike.setdefault(_likeness(model, group), []).append(group)
    curves: dict[str, _Curve] = {}
    with at_rest(model):
        calls = record(model, {_place(same[0]) for same in alike.values()}, moved(example, device))
        watch = _Stopwatch(model, graph, calls, device, repeats)
        for same in track(alike.values(), "Timing layers", len(alike)):
            curve = watch.curve(same[0], widths)
            curves |= {group.name: curve for group in same}
        total = median_seconds(lambda: calls[""](model), device, repeats)
        least = watch.seconds("", {group.name: curves[group.name].kept[0] for group in groups})
    gains = math.fsum(curve.gain for curve in curves.values())
    share = _share(total, least, gains)
    tables = {
        name: tuple(share * seconds for seconds in curve.table()) for name, curve in curves.items()
    }
    rest = Term(coefficient=total - share * gains, sizes=(), cuts=())
    return Cost(name="latency", terms=(rest,), tables=tables)


def _share(total: float, least: float | None, gains: float) -> float:
    """Of the gains measured apart, those that the whole model has; all there can be where it was
    not measured.
    """
    if not gains:
        return 0.0
    return min(1.0, total / gains) if least is None else max(total - least, 0.0) / gains


@dataclass(frozen=True)
class _Curve:
    """Seconds measured at numbers of units kept, both rising; the last number is the dense one."""

    kept: Sequence[int]
    seconds: Sequence[float]

    @property
    def gain(self) -> float:
        """Seconds between the dense and the narrowest."""
        return self.seconds[-1] - self.seconds[0]

    def table(self) -> list[float]:
        """Seconds above the narrowest with 0, 1, … units kept, linear between those measured, flat
        below them.
        """
        table = [0.0] * (self.kept[0] + 1)
        for i in range(1, len(self.kept)):
            low, high = self.seconds[i - 1] - self.seconds[0], self.seconds[i] - self.seconds[0]
            span = self.kept[i] - self.kept[i - 1]
            table += [low + (high - low) * step / span for step in range(1, span + 1)]
        return list(accumulate(table, max))  # rounding must not break the order


@dataclass(frozen=True)
class _Stopwatch:
    """Times a group's layer, or the whole model, cut to a number of units."""

    model: nn.Module
    graph: CouplingGraph
    calls: Mapping[str, Call]
    device: torch.device
    repeats: int

    def curve(self, group: Group, widths: int) -> _Curve:
        """The seconds at some widths; of the whole model where the layer, cut, doesn't run on what
        it gets.
        """
        for place in dict.fromkeys((_place(group), "")):
            measured = {
                units: self.seconds(place, {group.name: units})
                for units in spread(group.num_units, widths)
            }
            points = {units: seconds for units, seconds in measured.items() if seconds is not None}
            if len(points) > 1 and group.num_units in points:
                return _Curve(list(points), isotonic(list(points.values())))
        say(
            f"{group.name}: can't be timed at fewer units than it has: cutting it counts as no gain"
        )
        return _Curve([group.num_units], [0.0])

    def seconds(self, place: str, kept: Mapping[str, int]) -> float | None:
        """Of one call of the module at `place` with so many units kept; None where it can't be cut
        so or run alone.
        """
        skeleton = meta_copy(self.model).eval()
        plan = PruningPlan(
            {name: range(units, self.graph[name].num_units) for name, units in kept.items()}
        )
        try:
            apply_plan(skeleton, self.graph, plan)
        except SurgeryError:
            return None
        module = filled(skeleton.get_submodule(place), self.model.get_submodule(place))
        try:
            return median_seconds(lambda: self.calls[place](module), self.device, self.repeats)
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
        ):  # alone it got the arguments of the dense model
            return None


def spread(units: int, widths: int) -> list[int]:
    """Numbers of units to measure, rising to all of them: evenly spread, at multiples of a power of
    two.
    """
    step = 1
    while step < _ALIGNMENT and units // (2 * step) >= 2 * widths:
        step *= 2
    places = (round(i * units / max(widths - 1, 1) / step) * step for i in range(widths))
    return sorted({*(min(max(place, 1), units) for place in places), units})


def isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values`: neighbours in the wrong order are pooled
    into their mean.
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (mean * count + before * size) / (count + size), count + size
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def _place(group: Group) -> str:
    """Path of the layer a group lies in; empty, the whole model, where it lies in none."""
    if group.layer is None:
        return ""
    parts = group.module.split(".")
    return ".".join(parts[: parts.index(str(group.layer)) + 1])


def _likeness(model: nn.Module, group: Group) -> Any:
    """Equal for groups that cut equal layers equally."""
    place = _place(group)
    if not place:
        return group.name
    layer = model.get_submodule(place)
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    members = tuple(
        (m.parameter.removeprefix(place), m.dim, tuple(m.index.shape)) for m in group.members
    )
    return type(layer), group.kind, group.num_units, shapes, members
