"""Curves of seconds over numbers of units kept: where to measure them, what to make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# Widths are measured at multiples of a power of two up to this one: kernels run slower at odd
# widths than at the round ones beside them.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Curve:
    """Seconds measured at numbers of units kept, both rising; the last number is the dense one."""

    kept: Sequence[int]
    seconds: Sequence[float]

    @property
    def gain(self) -> float:
        """Seconds between the dense and the narrowest width."""
        return self.seconds[-1] - self.seconds[0]

    def table(self) -> list[float]:
        """Seconds above the narrowest with 0, 1, … units kept.

        They are linear between the widths that were measured, and zero below the narrowest.
        """
        table = [0.0] * (self.kept[0] + 1)
        for i in range(1, len(self.kept)):
            low, high = self.seconds[i - 1] - self.seconds[0], self.seconds[i] - self.seconds[0]
            span = self.kept[i] - self.kept[i - 1]
            table += [low + (high - low) * step / span for step in range(1, span + 1)]
        return list(accumulate(table, max))  # rounding must not break the order


def spread_widths(units: int, widths: int, none: bool = False) -> list[int]:
    """Numbers of units to measure, rising to all of them; with `none`, no unit as well.

    Evenly spread, at multiples of a power of two.
    """
    step = 1
    while step < _ALIGNMENT and units // (2 * step) >= 2 * widths:
        step *= 2
    places = (round(i * units / max(widths - 1, 1) / step) * step for i in range(widths))
    fewest = [0] if none else []
    return sorted({*fewest, *(min(max(place, 1), units) for place in places), units})


def fit_isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in least squares (pool adjacent violators).

    Neighbours in the wrong order are pooled into their mean.
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (mean * count + before * size) / (count + size), count + size
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]
