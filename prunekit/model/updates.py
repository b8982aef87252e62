"""Updates of weights: low-rank factors or whole ones, which are added to weights or leave them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunekit.runtime.numbers import at_least_float32

# What is added to a weight: U [out, r] and V [r, in], the product of which it is; or itself, in the
# shape of the weight.
Factors = tuple[Tensor, ...]


def is_transposed(module: nn.Module) -> bool:
    """Whether a stock module's weight is stored [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


@torch.no_grad()
def merge(model: nn.Module, updates: Mapping[str, Factors]) -> None:
    """Add updates to the weights of these names, in place."""
    for name, factors in updates.items():
        weight = model.get_parameter(name).data
        wide = at_least_float32(weight)
        parts = [factor.to(wide) for factor in factors]
        if len(parts) == 1:
            delta = parts[0]
        else:
            delta = parts[0] @ parts[1]
            transposed = is_transposed(model.get_submodule(name.rpartition(".")[0]))
            delta = delta.T if transposed else delta
        weight.copy_(wide + delta)


def pack(updates: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Updates as tensors with a name each, for a file: NAME.0, NAME.1."""
    return {f"{name}.{i}": own for name, parts in updates.items() for i, own in enumerate(parts)}


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The updates that `pack` has taken apart."""
    updates: dict[str, Factors] = {}
    for key in sorted(tensors):
        name = key.rpartition(".")[0]
        updates[name] = (*updates.get(name, ()), tensors[key])
    return updates


def name_updates(
    model: nn.Module, updates: Mapping[nn.Module, Factors]
) -> dict[str, tuple[Tensor, ...]]:
    """Low-rank updates by the names of their weights, of modules that the model still has.

    One that has another shape than its weight is left out: the cut took more than was chosen.
    """
    named = {}
    for name, module in model.named_modules():
        if module in updates:
            up, down = updates[module]
            weight = model.get_parameter(f"{name}.weight")
            if weight.numel() and weight.numel() == len(up) * down.shape[1]:
                named[f"{name}.weight"] = updates[module]
    return named
