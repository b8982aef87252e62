"""What scoring borrows of a model and gives back: flags, gradients, modes, and its layers' forward
methods.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from prunekit.runtime.modes import evaluating


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients on, no parameter wanting one or holding one; all as it was
    afterwards.
    """
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter, flag, gradient in parameters:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def checkpointed(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Recompute each layer of the model's outermost `ModuleList`s in the backward pass instead of
    keeping it.
    """
    layers = _layers(model) if on else []
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is not None:
                layer.forward = forward
            elif "forward" in vars(layer):
                del layer.forward


def _layers(module: nn.Module) -> list[nn.Module]:
    """The entries of every `ModuleList` that lies in no other one, each once."""
    found = (
        list(module)
        if isinstance(module, nn.ModuleList)
        else [x for c in module.children() for x in _layers(c)]
    )
    return list(dict.fromkeys(found))
