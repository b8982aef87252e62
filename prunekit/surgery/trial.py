"""A cut tried on the model itself before any work, and undone: does it compute what it must?

A copy on meta tells whether a cut model runs, and not what it computes: a slice by constants still
runs, and a width that stands in the code as a number. So units of one group of each structure are
cut, and the model is compared with the masked one on the example, a few tokens long, on samples as
long as they are, and on samples twice as long, with which it may go another way.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from prunekit.errors import DataError
from prunekit.graph import CouplingGraph, Group
from prunekit.surgery.attempts import cut_until_right
from prunekit.surgery.attributes import Attempt
from prunekit.surgery.changes import Changes
from prunekit.surgery.check import Expectation, catch_fault, expect, expectations
from prunekit.surgery.cut import cut_model
from prunekit.surgery.fault import Fault
from prunekit.surgery.masking import run_inputs

_Removed = Mapping[str, list[int]]
_INCOMPARABLE = (DataError, torch.OutOfMemoryError)  # no finite numbers, or no memory for them


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """Where cuts are compared with the masked model.

    Args:
        model: the model, its weights loaded; it is put back after every cut.
        graph: its graph.
        longer: keyword arguments to compare with beside the example.
    """

    model: nn.Module
    graph: CouplingGraph
    longer: Sequence[Mapping[str, Any]] = ()

    def find_faults(self, cuts: Mapping[Hashable, _Removed]) -> dict[Hashable, str]:
        """Which of some cuts leave a model that computes something else, and what it is.

        All of them together are tried first, one by one only where that fails. Lists of layers are
        tried apart, with an inner layer too: of two lists, a run may cut other layers.

        Args:
            cuts: the cuts of groups of different structure by keys; name of a group → units.
        """
        layers = {key: cut for key, cut in cuts.items() if not self.graph[next(iter(cut))].members}
        faults = {key: self._find_fault_of_layers(cut) for key, cut in layers.items()}
        rest = {key: cut for key, cut in cuts.items() if key not in layers}
        together = {name: units for cut in rest.values() for name, units in cut.items()}
        if together and self._find_fault(together):
            faults |= {key: self._find_fault(removed) for key, removed in rest.items()}
        return {key: fault.text for key, fault in faults.items() if fault}

    def _find_fault_of_layers(self, cut: _Removed) -> Fault | None:
        fault = self._find_fault(cut)
        for name, units in cut.items():
            middle = self.graph[name].num_units // 2
            for alone in ([middle], units[-1:]):
                fault = fault or self._find_fault({name: alone})
        return fault

    def _find_fault(self, removed: _Removed) -> Fault | None:
        """What is wrong with a cut that is right on the example, as the run's own cut will be."""
        last: list[Changes] = []

        def cut(attempt: Attempt) -> Changes:
            last[:] = [cut_model(self.model, self.graph, removed, attempt)]
            return last[0]

        fault = None
        with suppress(*_INCOMPARABLE):
            for expectation in expectations(self.model, self.graph, removed):
                others = self._expect_longer(removed, expectation.wide)
                try:
                    fault = cut_until_right(cut, expectation.check_outputs)
                    for other in others:
                        fault = fault or catch_fault(other.check_outputs)
                finally:
                    for changes in last:
                        changes.undo()
                if fault is None or not fault.runs:
                    break
        return fault

    def _expect_longer(self, removed: _Removed, wide: torch.dtype) -> list[Expectation]:
        """What the model must compute of the longer samples."""
        found = []
        for samples in self.longer:
            run = partial(run_inputs, self.model, samples)
            with suppress(*_INCOMPARABLE):
                found.append(expect(self.model, self.graph, removed, wide, run))
        return found


def outer_units(cut: _Removed, groups: Sequence[Group]) -> dict[str, list[int]]:
    """As many units as a cut takes from the end, from both ends of each group where they suffice.

    A slice by constants counts from the beginning or from the end: either is moved by this.

    Args:
        cut: name of a group → its last units.
        groups: the groups.
    """
    outer = {}
    for group in groups:
        if last := cut.get(group.name):
            first = range(len(last))
            enough = group.num_units - 2 * len(last) >= group.fewest
            outer[group.name] = [*first, *last] if enough else [*first]
    return outer
