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

from prunekit.calibration.gradients.taps import input_of
from prunekit.calibration.padding import remove_padding
from prunekit.data.batches import Batch
from prunekit.errors import DataError
from prunekit.model.inputs import without_cache
from prunekit.model.linear import is_stock
from prunekit.model.ties import tensor_places
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed


@dataclass
class InputSums:
    """Sums over tokens of a module's inputs x [n] and of their squares, in float64."""

    tokens: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Take in x [..., n]."""
        rows = x.flatten(0, -2).detach().double()
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

    Padding does not count.

    Args:
        model: the model; it is left as it was.
        names: the parameters of interest; those that are no weight of such a module are left out.
        batches: the calibration set, keyword arguments of forward calls.

    Returns:
        Name of the weight → statistics, for modules that ran.

    Raises:
        DataError: inputs hold NaN or infinity; padding that can't be removed.
    """
    places = tensor_places(model)
    modules = {
        name: {p.module for p in places[name] if p.attribute == "weight" and is_stock(p.module)}
        for name in names
    }
    inputs = {name: InputSums() for name, readers in modules.items() if readers}
    with undisturbed(model), ExitStack() as stack, torch.no_grad():
        for name, own in inputs.items():
            for module in modules[name]:
                see = partial(_see, own)
                stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        rows = remove_padding(model, batches)
        for batch in track(rows, "activations", len(rows)):
            model(**without_cache(model, batch))
    fed = {name: own for name, own in inputs.items() if own.tokens}
    for name, own in fed.items():
        if not torch.isfinite(own.norm()).all():
            raise DataError(f"{name}: its inputs hold NaN or infinity")
    return fed


def _see(
    inputs: InputSums, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Forward pre-hook of a module, once the statistics of its `inputs` are bound."""
    inputs.add(input_of(args, kwargs))
