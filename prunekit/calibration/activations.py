"""Statistics of what linear modules are fed: one forward pass over the calibration set, vectors
only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.taps import is_stock
from prunekit.data.batches import Batch, padding_mask
from prunekit.errors import DataError
from prunekit.model.inputs import without_cache
from prunekit.model.ties import tensor_places
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed


@dataclass
class Inputs:
    """Running sums over tokens of a module's input features x [n], float64."""

    tokens: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, mask: Tensor | None, x: Tensor) -> None:
        """Take in x [..., n]; `mask` [...] is False at positions that don't count (padding)."""
        rows = (
            x[mask.to(x.device)]
            if mask is not None and mask.shape == x.shape[:-1]
            else x.flatten(0, -2)
        )
        rows = rows.detach().double()
        self.tokens += len(rows)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    def norm(self) -> Tensor:
        """‖x_j‖₂ over all tokens [n]."""
        assert isinstance(self.squares, Tensor)
        return self.squares.sqrt()

    def variance(self) -> Tensor:
        """Mean squared distance from the mean [n]."""
        assert isinstance(self.squares, Tensor)
        mean = self.total / self.tokens
        return (self.squares / self.tokens - mean * mean).clamp_min(0)


def input_statistics(
    model: nn.Module, names: Iterable[str], batches: Sequence[Batch]
) -> dict[str, Inputs]:
    """Weight of a stock linear module among the parameters `names` → what its module is fed, in
    evaluation mode.

    Raises:
        DataError: inputs hold NaN or infinity.
    """
    places = tensor_places(model)
    modules = {n: places[n][0].module for n in names if places[n][0].attribute == "weight"}
    found = {name: Inputs() for name, module in modules.items() if is_stock(module)}
    mask: Tensor | None = None

    def hook(inputs: Inputs, _: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.add(mask, args[0])

    with undisturbed(model), ExitStack() as stack, torch.no_grad():
        for name, inputs in found.items():
            stack.callback(modules[name].register_forward_pre_hook(partial(hook, inputs)).remove)
        for batch in track(batches, "activations", len(batches)):
            mask = padding_mask(batch)
            model(**without_cache(model, batch))
    for name, inputs in found.items():
        if inputs.tokens and not torch.isfinite(inputs.norm()).all():
            raise DataError(f"{name}: its inputs hold NaN or infinity")
    return {name: inputs for name, inputs in found.items() if inputs.tokens}
