"""Contexts that lend a model out and leave every module, flag and buffer as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode during a `with` block; afterwards every module's mode is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """As `evaluating`; buffers are put back as well, for a forward pass may count its calls."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with evaluating(model):
            yield
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
