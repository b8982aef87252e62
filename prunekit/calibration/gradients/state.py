"""Layers that are computed again in the backward pass, which saves keeping their activations."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prunekit.calibration.gradients.loss import mean_loss
from prunekit.data.batches import Batch, count_positions, split_samples
from prunekit.model.stack import all_layers
from prunekit.runtime.console import say
from prunekit.runtime.memory import free_bytes
from prunekit.runtime.modes import keep_attributes, restoring

# Of the free memory, what activations may take, and as much again for moments of gradients; the
# rest is for a gradient and what is computed from it.
SHARE = 0.4


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


def should_recompute(
    model: nn.Module, batches: Sequence[Batch], names: Collection[str] = ()
) -> bool:
    """Whether the activations of the largest batch would take too much memory.

    Args:
        model: with gradients on, where no parameter wants one (`undisturbed`); it may have taps.
        batches: the calibration set.
        names: the parameters whose gradients are wanted.
    """
    if not batches or not all_layers(model):
        return False
    largest = max(batches, key=lambda batch: sum(t.numel() for t in _tensors(batch)))
    need = count_saved_bytes(model, largest, names)
    free = free_bytes(next(model.parameters()).device)
    if need <= SHARE * free:
        return False
    say(
        f"activations would take {need / 2**30:.1f} GiB of {free / 2**30:.1f} free: layers are "
        "computed again in the backward pass"
    )
    return True


def count_saved_bytes(model: nn.Module, batch: Batch, names: Collection[str]) -> int:
    """Bytes that a forward pass of the batch would keep for its backward pass, at most.

    Counted in a pass that keeps nothing, of the first row of tokens, where the batch has rows of
    tokens; what two operators keep counts twice.
    """
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    counted = 0

    def count(tensor: Tensor) -> None:
        nonlocal counted
        if tensor.untyped_storage().data_ptr() not in weights:
            counted += tensor.nbytes

    tokens = batch.get("input_ids") is not None
    parameters = [model.get_parameter(name) for name in names]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(count, _refuse):
            mean_loss(model, split_samples(batch)[0] if tokens else batch)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return counted * (count_positions(batch)[0] if tokens else 1)


def _refuse(_: None) -> Tensor:
    raise AssertionError("nothing was kept")


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]
