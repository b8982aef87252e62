"""What a sweep found at a glance: size or speed against perplexity, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunekit.report import words
from prunekit.report.palette import LIGHT
from prunekit.report.panels import new_figure
from prunekit.report.pictures import Picture
from prunekit.sweeps.index import DECODE, PERPLEXITY, Figures, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Price = Callable[[Figures], float | None]
_NAMED = 40  # points up to which each gets its number; beyond, those of the front


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run in the picture.

    Attributes:
        number: the number of the run; None of the dense model.
        price: parameters, or milliseconds a token; lower is better.
        perplexity: lower is better.
    """

    number: int | None
    price: float
    perplexity: float


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in one figure without being worse in the other, by price."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.price, point.perplexity)):
        if not front or point.perplexity < front[-1].perplexity:
            front.append(point)
    return front


def draw_pareto(lines: Sequence[Line]) -> Picture | None:
    """Parameters against perplexity, and where it was measured, time a token; None without runs."""
    prices: dict[str, Price] = {"parameters": _size, "milliseconds a token": _milliseconds}
    measured = {name: _points(lines, price) for name, price in prices.items()}
    panels = {name: points for name, points in measured.items() if points}
    if not panels:
        return None
    told = [
        f"by {name}, no run beats {', '.join(str(p.number) for p in front_of(_runs(points)))}"
        for name, points in panels.items()
    ]
    label = f"Points, the perplexity of each run: {'; '.join(told)}."

    def draw() -> Figure:
        figure, axes = new_figure([3.0] * len(panels))
        for panel, (name, points) in zip(axes, panels.items(), strict=True):
            _draw_panel(panel, points, name)
        return figure

    return Picture(name="pareto", label=label, draw=draw)


def _size(figures: Figures) -> float | None:
    return figures.get("parameters")


def _milliseconds(figures: Figures) -> float | None:
    """The time that one more token takes."""
    return 1000 / figures[DECODE] if figures.get(DECODE) else None


def _points(lines: Sequence[Line], price: Price) -> list[Point]:
    """The runs that have both figures; first the dense model, if it was measured."""
    dense = next((line.dense for line in lines if line.dense), Figures())
    numbered: list[tuple[int | None, Figures]] = [(None, dense)]
    numbered += [(line.record.number, line.figures) for line in lines]
    points = []
    for number, figures in numbered:
        paid, perplexity = price(figures), figures.get(PERPLEXITY)
        if paid is not None and perplexity is not None:
            points.append(Point(number=number, price=paid, perplexity=perplexity))
    return points


def _runs(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.number is not None]


def _draw_panel(panel: Axes, points: Sequence[Point], name: str) -> None:
    """Draw the runs, their front as steps, and the dense model as a square."""
    runs = _runs(points)
    front = front_of(runs)
    for point in points:
        if point.number is None:
            panel.plot(point.price, point.perplexity, "s", color=LIGHT["dense"])
            panel.annotate("dense", (point.price, point.perplexity), **_beside())
    behind = [point for point in runs if point not in front]
    panel.plot(*_axes(behind), "o", color=LIGHT["pruned"], markerfacecolor="none")
    panel.plot(*_axes(front), "o-", color=LIGHT["pruned"], drawstyle="steps-post", linewidth=1.2)
    for point in runs if len(runs) <= _NAMED else front:
        panel.annotate(str(point.number), (point.price, point.perplexity), **_beside())
    if max(p.perplexity for p in points) > 10 * min(p.perplexity for p in points):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.xaxis.set_major_formatter(lambda value, _: words.macs(value).replace(" G", " B"))
    panel.set(xlabel=name, ylabel="perplexity")
    panel.grid()
    panel.tick_params(length=0)


def _axes(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.price for point in points], [point.perplexity for point in points]


def _beside() -> dict[str, Any]:
    """Where a number stands beside its point."""
    return {
        "xytext": (4, 4),
        "textcoords": "offset points",
        "fontsize": 8,
        "color": LIGHT["soft"],
    }
