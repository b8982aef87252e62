"""A cut tried on the model itself before any work, and undone: does it compute what it must?

A copy on meta tells whether a cut model runs, and not what it computes: a slice by constants still
runs, and a width that stands in the code as a number. So units of one group of each structure are
cut, and the model is compared with the masked one on the example, a few tokens long, and on samples
as long as they are, with which it may go another way.
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
from prunekit.surgery.check import Run, expectations
from prunekit.surgery.cut import cut_model
from prunekit.surgery.fault import Fault
from prunekit.surgery.masking import run_inputs

_Removed = Mapping[str, list[int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """Where cuts are compared with the masked model.

    Args:
        model: the model, its weights loaded; it is put back after every cut.
        graph: its graph.
        longer: keyword arguments to compare with beside the example; None: there are none.
    """

    model: nn.Module
    graph: CouplingGraph
    longer: Mapping[str, Any] | None = None

    def find_faults(self, cuts: Mapping[Hashable, _Removed]) -> dict[Hashable, str]:
        """Which of some cuts leave a model that computes something else, and what it is.

        All of them together are tried first, one by one only where that fails, or where there are
        several lists of layers: the same layers of each may go where others could not.

        Args:
            cuts: the cuts of groups of different structure by keys; name of a group → units.
        """
        together = {name: units for cut in cuts.values() for name, units in cut.items()}
        lists = sum(stack.name in together for stack in self.graph.stacks)
        if lists < 2 and self._find_fault(together) is None:
            return {}
        faults = {key: self._find_fault(removed) for key, removed in cuts.items()}
        return {key: fault.text for key, fault in faults.items() if fault}

    def _find_fault(self, removed: _Removed) -> Fault | None:
        fault = self._find_fault_on(None, removed)
        if fault is None and self.longer is not None:
            fault = self._find_fault_on(partial(run_inputs, self.model, self.longer), removed)
        return fault

    def _find_fault_on(self, run: Run | None, removed: _Removed) -> Fault | None:
        last: list[Changes] = []

        def cut(attempt: Attempt) -> Changes:
            last[:] = [cut_model(self.model, self.graph, removed, attempt)]
            return last[0]

        fault = None
        # Without finite numbers, or memory for the longer samples, there is nothing to compare.
        with suppress(DataError, torch.OutOfMemoryError):
            for expectation in expectations(self.model, self.graph, removed, run):
                try:
                    fault = cut_until_right(cut, expectation.check_outputs)
                finally:
                    for changes in last:
                        changes.undo()
                if fault is None or not fault.runs:
                    break
        return fault


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
