"""Spread a saving over measured curves so that the sum of their errors is least."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

_TINY = 1e-300  # a saving of zero has an infinite price, but divides


class Point(NamedTuple):
    """A part that is cut by a ratio: the cost that is saved, and the error that is left."""

    ratio: float
    saving: float
    error: float


class _Segment(NamedTuple):
    """A piece of a curve between two points, up to the ratio `end`."""

    price: float  # error per saving
    key: str
    saving: float
    end: float


def spread_saving(curves: Mapping[str, Sequence[Point]], target: float) -> dict[str, float]:
    """The ratio of each curve at which the savings add up to `target`, or to all there is.

    The curves become their lower convex hulls, linear between points; then segments are taken in
    the order of their price, the last one in part. That is the exact optimum for piecewise linear
    convex curves. Each curve rises in its ratios, from the point (0, 0, 0).
    """
    segments = [
        _Segment(
            (b.error - a.error) / max(b.saving - a.saving, _TINY), key, b.saving - a.saving, b.ratio
        )
        for key, curve in curves.items()
        for a, b in pairwise(lower_hull(curve))
    ]
    ratios, left = dict.fromkeys(curves, 0.0), target
    for segment in sorted(segments, key=lambda segment: segment.price):
        part = min(max(left / segment.saving, 0.0), 1.0) if segment.saving > 0 else 0.0
        ratios[segment.key] += part * (segment.end - ratios[segment.key])
        left -= part * segment.saving
    return ratios


def lower_hull(curve: Iterable[Point]) -> list[Point]:
    """The lower convex hull of the errors over the savings."""
    hull: list[Point] = []
    for point in curve:
        if hull and point.saving <= hull[-1].saving:
            continue  # its ratio was rounded to the units of the point before
        while len(hull) > 1 and not _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_up(a: Point, b: Point, c: Point) -> bool:
    """Whether the slope from a to b is below the slope from a to c."""
    return (b.error - a.error) * (c.saving - a.saving) < (c.error - a.error) * (b.saving - a.saving)
