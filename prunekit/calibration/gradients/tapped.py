"""Which parameters get their gradients from taps: those of stock linear modules that run once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.loss import is_language_model
from prunekit.data.batches import Batch, split_samples
from prunekit.model.inputs import without_cache
from prunekit.model.linear import is_stock
from prunekit.model.ties import tensor_places


@dataclass(frozen=True)
class TappedLinear:
    """A linear module that runs once a forward pass, on x [B, T, in].

    `attribute`: weight or bias, whichever the parameter is.
    """

    module: nn.Module
    attribute: str


def find_tapped(
    model: nn.Module, batches: Sequence[Batch], names: Collection[str]
) -> dict[str, TappedLinear]:
    """The parameters that one stock linear module holds and uses once, on inputs [B, T, in].

    Tried on the first sample alone, where no other two axes have the sizes [1, T]. Empty where the
    model is no language model.
    """
    places = tensor_places(model)
    candidates = {
        name: TappedLinear(places[name][0].module, places[name][0].attribute)
        for name in names
        if len(places[name]) == 1 and is_stock(places[name][0].module)
    }
    if not batches:
        return {}
    sample = split_samples(batches[0])[0]
    shapes: dict[nn.Module, list[tuple[int, ...]]] = {
        linear.module: [] for linear in candidates.values()
    }
    with ExitStack() as stack, torch.no_grad():
        for module, own in shapes.items():
            note = partial(_note_shape, own)
            stack.callback(module.register_forward_hook(note).remove)
        outputs = model(**without_cache(model, sample))
    if not is_language_model(model, outputs, sample):
        return {}
    expected = [tuple(sample["input_ids"].shape)]
    return {
        name: linear for name, linear in candidates.items() if shapes[linear.module] == expected
    }


def _note_shape(
    shapes: list[tuple[int, ...]], module: nn.Module, args: object, output: Tensor
) -> None:
    """Forward hook that notes all sizes of an output but the last, once `shapes` is bound."""
    shapes.append(tuple(output.shape[:-1]))
