"""The numbers that token weights come from: squared norms [B, T] of each token, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.calibration.blocks import Block
from prunekit.calibration.consumers import Consumer
from prunekit.calibration.gradients.loss import mean_loss
from prunekit.calibration.gradients.state import recomputing, should_recompute
from prunekit.calibration.gradients.taps import tap
from prunekit.calibration.layer_pass import LayerPass
from prunekit.calibration.targets import is_added, run_dense_blocks
from prunekit.calibration.weighting import Outputs
from prunekit.data.batches import Batch, copy_batch
from prunekit.errors import DataError
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed
from prunekit.runtime.numbers import at_least_float32

Norms = list[Tensor]  # ‖·‖² [B, T] in float32 at least, one for each batch


def has_norms(model: nn.Module) -> bool:
    """Whether a model has norms, before which the size of a token does not matter."""
    return any("norm" in type(module).__name__.lower() for module in model.modules())


def stream_norms(layer: LayerPass, block: Block, normed: bool) -> Norms | None:
    """‖h‖² of the dense residual stream h behind a block.

    None where there is no such stream: the model is not `normed`, or something lies between the
    block's output and the stream.
    """
    if not normed or not is_added(layer, block):
        return None
    batches = range(len(layer.batches))
    return [_squared(run_dense_blocks(layer, batch, block)) for batch in batches]


def block_norms(layer: LayerPass, block: Block) -> Norms:
    """‖y‖² of the output y that the consumer of a block has in the dense model."""
    return [_squared(block.dense[batch].get()) for batch in range(len(layer.batches))]


@torch.no_grad()
def output_norms(
    model: nn.Module, consumers: Mapping[str, Consumer], batches: Sequence[Batch]
) -> dict[str, Norms]:
    """‖y‖² of the output y of each consumer, by its key, from one pass of the model."""
    found: dict[str, Norms] = {key: [] for key in consumers}

    def note(key: str, module: nn.Module, args: object, output: Tensor) -> None:
        found[key].append(_squared(output))

    with ExitStack() as stack:
        for key, consumer in consumers.items():
            handle = consumer.module.register_forward_hook(partial(note, key))
            stack.callback(handle.remove)
        for batch in batches:
            model(**copy_batch(batch))
    return {key: norms for key, norms in found.items() if len(norms) == len(batches)}


@dataclass
class OutputGradients:
    """What is kept of δ = ∂L/∂y of a consumer's output y; L is the loss summed over targets.

    `norms`: ‖δ‖² of each batch. `products`: Σ δ δᵀ [d, d] over all tokens, or the squares Σ δ² [d],
    where they are asked for.
    """

    norms: Norms = field(default_factory=list)
    products: Tensor | None = None

    def add(self, delta: Tensor, outputs: Outputs) -> None:
        """Take in δ [B, T, d] of a batch."""
        self.norms.append(_squared(delta))
        if outputs == "equal":
            return
        rows = at_least_float32(delta.detach()).flatten(0, -2)
        own = rows.square().sum(0) if outputs == "diagonal" else rows.T @ rows
        self.products = own if self.products is None else self.products.add_(own)


def gather_gradients(
    model: nn.Module,
    consumers: Mapping[str, Consumer],
    batches: Sequence[Batch],
    outputs: Outputs = "equal",
) -> dict[str, OutputGradients]:
    """The gradients of each consumer's output, by its key; the model is left as it was.

    Raises:
        DataError: the model has no loss, or no gradient reaches its consumers.
    """
    found = {key: OutputGradients() for key in consumers}

    def receive(key: str, _: Tensor, delta: Tensor) -> None:
        found[key].add(delta, outputs)

    with undisturbed(model), ExitStack() as stack:
        for key, consumer in consumers.items():
            stack.callback(tap(consumer.module, _keep_nothing, partial(receive, key)).remove)
        with recomputing(model, should_recompute(model, batches)):
            for batch in track(batches, "gradients of the outputs", len(batches)):
                loss = mean_loss(model, copy_batch(batch))
                if loss.value.requires_grad:
                    (loss.value * sum(loss.counts)).backward()
    fed = {key: own for key, own in found.items() if len(own.norms) == len(batches)}
    if consumers and not fed:
        raise DataError(
            "tokens=gradient or outputs: expected a model through which gradients flow, none "
            f"reaches {next(iter(consumers))} of {type(model).__name__}"
        )
    return fed


def _keep_nothing(x: Tensor) -> Tensor:
    return x.new_empty(0)


def _squared(tensor: Tensor) -> Tensor:
    """‖·‖² [B, T] of a tensor [B, T, d]."""
    return at_least_float32(tensor.detach()).square().sum(-1)
