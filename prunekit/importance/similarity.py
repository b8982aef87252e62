"""Block influence of whole layers (Men et al. 2024, arXiv 2403.03853).

BI_l = 1 − E_t [ cos(h_{l,t}, h_{l+1,t}) ]: how much layer l turns the hidden states h of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.calibration.padding import remove_padding
from prunekit.data.batches import Batch
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import ScoreImportance
from prunekit.importance.structures import expect_stacks
from prunekit.model.inputs import without_cache
from prunekit.model.stack import hidden_of_call, hidden_of_output
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed
from prunekit.runtime.numbers import at_least_float32


@dataclass(frozen=True, kw_only=True)
class Similarity(ScoreImportance):
    """1 − the mean cosine of the hidden states that a layer takes and returns."""

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One forward pass over the calibration set; padding does not count."""
        stacks = expect_stacks(self.name, groups)
        meters = {
            (stack.name, unit): _Meter() for stack in stacks for unit in range(stack.num_units)
        }
        with undisturbed(model), ExitStack() as hooks, torch.no_grad():
            for stack in stacks:
                for unit in range(stack.num_units):
                    layer = model.get_submodule(f"{stack.module}.{unit}")
                    see = meters[stack.name, unit].see
                    hooks.callback(layer.register_forward_hook(see, with_kwargs=True).remove)
            rows = remove_padding(model, batches)
            for batch in track(rows, "similarity", len(rows)):
                model(**without_cache(model, batch))
        return {
            stack.name: torch.stack(
                [meters[stack.name, unit].mean() for unit in range(stack.num_units)]
            )[None]
            for stack in stacks
        }


@dataclass
class _Meter:
    """The mean of 1 − cosine over the tokens that one layer has seen.

    The sums stay on the device of the layer, so that no layer waits for it.
    """

    sums: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def see(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the layer that adds the tokens of one call."""
        before, after = hidden_of_call(args, kwargs), hidden_of_output(output)
        assert before is not None
        assert after is not None
        wide = at_least_float32(before), at_least_float32(after)
        cosines = F.cosine_similarity(*wide, dim=-1)
        change = 1 - cosines.double()
        self.sums.append(change.sum())
        self.counts.append(change.numel())

    def mean(self) -> Tensor:
        """The mean, float64 [] on the CPU; 0 where no token was seen."""
        total = sum(float(part) for part in self.sums)
        return torch.tensor(max(total / max(sum(self.counts), 1), 0.0), dtype=torch.float64)
