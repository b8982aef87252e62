"""All weights of a model at once: their number, whether they are finite, their type."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from prunekit.errors import DataError
from prunekit.runtime.modes import Restore

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def num_parameters(model: nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_finite(model: nn.Module) -> None:
    """Raise DataError where a weight is NaN, infinite or not loaded; its message names which."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise DataError(f"{name}: it is on the meta device: expected a model that is loaded")
        if not torch.isfinite(parameter).all():
            raise DataError(f"{name}: the weights hold NaN or infinity")


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits that tell the weights of one model from those of another.

    They are a digest of the name, the shape, the sum and the first 64 numbers of each parameter:
    cheap for a model of any size, but no protection against somebody who wants a collision.
    """
    hashed = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sums = (
            parameter.detach().double().sum().item(),
            parameter.detach().flatten()[:64].double().tolist(),
        )
        hashed.update(f"{name} {tuple(parameter.shape)} {sums}".encode())
    return hashed.hexdigest()[:16]


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast every parameter in place; the config of the model then names that type."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def keep_types(model: PreTrainedModel) -> Restore:
    """Note the types of a model's parameters, and the one that its config names."""
    types = [(parameter, parameter.dtype) for parameter in model.parameters()]
    named = model.config.dtype

    def restore() -> None:
        for parameter, dtype in types:
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = named

    return restore


def round_weights(model: nn.Module, stored: torch.dtype) -> None:
    """Round the weights in place to numbers that the type `stored` can hold; their type stays.

    The model that is measured then computes with the numbers that are saved.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored).to(parameter.dtype)
