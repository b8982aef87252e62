"""Layers that are computed again in the backward pass, which saves keeping their activations."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from prunekit.model.stack import all_layers
from prunekit.runtime.modes import keep_attributes, restoring


@contextmanager
def recomputing(model: nn.Module, on: bool = True) -> Iterator[None]:
    """Compute each layer of the model's outermost `ModuleList`s again in the backward pass.

    Afterwards every layer has the forward method that it had. Without `on` nothing changes.
    """
    layers = all_layers(model) if on else []
    with restoring(keep_attributes(layers, "forward")):
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
