"""The base of every cost: what a model costs once so many units of each group are gone.

A cost is a backend: a frozen dataclass with its own options, derived from `CostModel`, that looks
at the dense model once and answers with a `Cost`. From then on no model is run: the budget calls
the `Cost` thousands of times.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from prunekit.data.batches import Batch
from prunekit.graph import CouplingGraph, Group


@dataclass(frozen=True, kw_only=True)
class Term:
    """One product of a cost: coefficient · Π_i kept_i.

    kept_i = sizes[i] − Σ width · (units removed from the group), summed over the (group, i, width)
    of `cuts` that name the factor i.
    """

    coefficient: float
    sizes: tuple[int, ...]
    cuts: tuple[tuple[str, int, int], ...]

    def __call__(self, removed: Mapping[str, float]) -> float:
        """The value of the term once so many (fractional) units of each group are gone."""
        kept = [float(size) for size in self.sizes]
        for name, i, width in self.cuts:
            kept[i] -= width * removed.get(name, 0.0)
        return self.coefficient * math.prod(kept)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs: a sum of terms, and of one table per group.

    A cost must not rise when units go.

    Args:
        name: the measure, as reports call it: parameters, bytes, flops, latency, …
        terms: products of numbers of units kept; exact however groups overlap.
        tables: group → its cost with 0, 1, … num_units units kept, linear in between.
        unit: what the numbers count, in messages; the name of the measure where empty.
        stored: the numbers that a checkpoint stores are counted, so that the values are whole
            numbers, and a parameter that a repair adds counts like any other.
        remeasure: given the cut model, measures the cost again: where terms and tables only
            estimate what the cut model will cost.
    """

    name: str
    terms: tuple[Term, ...] = ()
    tables: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    unit: str = ""
    stored: bool = False
    remeasure: Callable[[nn.Module], float] | None = None

    def __call__(self, removed: Mapping[str, float]) -> float:
        """The cost that is left once so many (fractional) units of each group are gone."""
        return math.fsum(term(removed) for term in self.terms) + math.fsum(
            _interpolate(table, len(table) - 1 - removed.get(name, 0.0))
            for name, table in self.tables.items()
        )


@dataclass(frozen=True, kw_only=True)
class CostSetting:
    """What a cost may look at.

    Args:
        model: the dense model, to be left as it is.
        graph: its coupled groups.
        groups: those of them that may be cut.
        batches: the calibration set, keyword arguments of forward calls.
        stored: the dtype that the result is stored in; the dtype of each parameter where None.
    """

    model: nn.Module
    graph: CouplingGraph
    groups: Sequence[Group]
    batches: Sequence[Batch]
    stored: torch.dtype | None = None


@dataclass(frozen=True, kw_only=True)
class CostModel(ABC):
    """A way of counting the cost of a model: `ratio` is a share of it, `target.limit` its limit.

    Attributes:
        name: the measure, as reports and the options `target.NAME` call it.
        counts_layers: whole layers can be counted, not only units inside of them.
        measures: the model is run for it, so that its weights must be in memory.
        yields: the cost of the measure that a limit of `target` is given in takes its place.
    """

    name: ClassVar[str]
    counts_layers: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    yields: ClassVar[bool] = False

    @classmethod
    def for_target(cls, *, tokens: int, batch: int) -> CostModel:
        """The cost that `target.NAME` stands for, with `target.tokens` and `target.batch`."""
        return cls()

    @abstractmethod
    def measure(self, setting: CostSetting) -> Cost:
        """Look at the dense model; the cost of any cut of it, which never rises when units go."""


def _interpolate(table: tuple[float, ...], kept: float) -> float:
    low = min(int(kept), len(table) - 2)
    return table[low] + (table[low + 1] - table[low]) * (kept - low)
