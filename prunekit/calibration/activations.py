"""Statistics of the single inputs of linear modules, from one pass over the calibration set.

`moments` hold the products of all inputs of one consumer; these are vectors, gathered for all
modules of the model at once.
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
class InputSums:
    """Sums over tokens of a module's inputs x [n] and of their squares, in float64."""

    tokens: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, mask: Tensor | None, x: Tensor) -> None:
        """Take in x [..., n]; `mask` [...] is False at padding."""
        fits = mask is not None and mask.shape == x.shape[:-1]
        rows = x[mask.to(x.device)] if mask is not None and fits else x.flatten(0, -2)
        rows = rows.detach().double()
        self.tokens += len(rows)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    def norm(self) -> Tensor:
        """‖x_j‖₂ over all tokens [n]."""
        assert isinstance(self.squares, Tensor)
        return self.squares.sqrt()

    def variance(self) -> Tensor:
        """Var(x_j) [n], the mean squared distance from the mean."""
        assert isinstance(self.squares, Tensor)
        mean = self.total / self.tokens
        return (self.squares / self.tokens - mean * mean).clamp_min(0)


def gather_input_statistics(
    model: nn.Module, names: Iterable[str], batches: Sequence[Batch]
) -> dict[str, InputSums]:
    """Gather statistics of the inputs of all stock linear modules, in evaluation mode.

    Args:
        model: the model; it is left as it was.
        names: the parameters of interest; those that are no weight of such a module are left out.
        batches: the calibration set, keyword arguments of forward calls.

    Returns:
        Name of the weight → statistics, for modules that ran.

    Raises:
        DataError: inputs hold NaN or infinity.
    """
    places = tensor_places(model)
    modules = {
        name: [p.module for p in places[name] if p.attribute == "weight" and is_stock(p.module)]
        for name in names
    }
    watcher = _Watcher({name: InputSums() for name, readers in modules.items() if readers})
    with undisturbed(model), ExitStack() as stack, torch.no_grad():
        for name in watcher.inputs:
            for module in modules[name]:
                see = partial(watcher.see, name)
                stack.callback(module.register_forward_pre_hook(see).remove)
        for batch in track(batches, "activations", len(batches)):
            watcher.mask = padding_mask(batch)
            model(**without_cache(model, batch))
    fed = {name: inputs for name, inputs in watcher.inputs.items() if inputs.tokens}
    for name, inputs in fed.items():
        if not torch.isfinite(inputs.norm()).all():
            raise DataError(f"{name}: its inputs hold NaN or infinity")
    return fed


@dataclass
class _Watcher:
    """The statistics by weight, and the padding mask of the batch in turn [B, T]."""

    inputs: dict[str, InputSums]
    mask: Tensor | None = None

    def see(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a module, once its weight's `name` is bound."""
        self.inputs[name].add(self.mask, args[0])
