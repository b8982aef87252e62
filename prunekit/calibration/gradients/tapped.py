"""Which parameters get their gradients from taps: those of stock linear modules that run once.

A tap sees what its module does. Where a parameter has other uses, autograd knows its gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunekit.calibration.gradients.loss import is_language_model
from prunekit.data.batches import Batch, split_samples
from prunekit.model.inputs import without_cache
from prunekit.model.linear import is_stock
from prunekit.model.ties import tensor_places

_tree = torch.utils._pytree


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

    Nothing else may use them, as a module around it may by `F.linear(x, module.weight)`. Tried on
    the first sample alone, where no other two axes have the sizes [1, T]. Empty where the model is
    no language model.
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
    uses = _Uses({name: getattr(own.module, own.attribute) for name, own in candidates.items()})
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(uses)
        for module, own in shapes.items():
            note = partial(_note_shape, own)
            stack.callback(module.register_forward_hook(note).remove)
        outputs = model(**without_cache(model, sample))
    if not is_language_model(model, outputs, sample):
        return {}
    expected = [tuple(sample["input_ids"].shape)]
    return {
        name: linear
        for name, linear in candidates.items()
        if shapes[linear.module] == expected and uses.counts[name] == 1
    }


class _Uses(TorchFunctionMode):
    """Counts the calls that make a tensor of a parameter.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.counts = Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {id(one) for one in _tree.tree_leaves((args, kwargs))} & self.names.keys()
        if given and any(isinstance(one, Tensor) for one in _tree.tree_leaves(result)):
            self.counts.update(self.names[one] for one in given)  # no shape was asked for
        return result


def _note_shape(
    shapes: list[tuple[int, ...]], module: nn.Module, args: object, output: Tensor
) -> None:
    """Forward hook that notes all sizes of an output but the last, once `shapes` is bound."""
    shapes.append(tuple(output.shape[:-1]))
