"""Targets: the outputs that a block's consumer must give on the inputs from pruned layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekit.calibration.blocks import Block
from prunekit.calibration.layer_pass import LayerPass
from prunekit.runtime.numbers import at_least_float32
from prunekit.runtime.processes import hold_everywhere


def compute_target(layer: LayerPass, batch: int, block: Block, target: str) -> Tensor:
    """Compute the target of a block's consumer on a batch [B, T, d].

    dense: the output of the consumer in the dense model. residual: the output that brings back the
    dense residual stream behind the block. It is a difference of two streams: that of the dense
    layer up to and with this block, less that of the layer as it is by now, without this block. The
    blocks behind this one give zero in both.
    """
    if target == "dense":
        return block.dense[batch].get()
    earlier, later = layer.finder.around(block)
    if block.ends_sum:
        lacking = at_least_float32(layer.dense[batch].get()) - layer.hidden[batch].get()
        for other in earlier:
            lacking += other.dense[batch].get().reshape(lacking.shape)
            lacking -= other.output(batch, layer.store).reshape(lacking.shape)
        return lacking.add_(block.dense[batch].get().reshape(lacking.shape))
    zero = {other: torch.zeros_like(other.dense[batch].get()) for other in (block, *later)}
    pruned = {other: other.output(batch, layer.store) for other in earlier}
    stream = run_dense_blocks(layer, batch, block)
    without = layer.run(batch, {**zero, **pruned})
    return at_least_float32(stream) - at_least_float32(without)


def run_dense_blocks(layer: LayerPass, batch: int, block: Block) -> Tensor:
    """The dense residual stream [B, T, d] up to and with a block; those behind it give zero."""
    earlier, later = layer.finder.around(block)
    if block.ends_sum:
        stream = at_least_float32(layer.dense[batch].get()).clone()
        for other in (*earlier, block):
            stream += other.dense[batch].get().reshape(stream.shape)
        return stream
    zero = {other: torch.zeros_like(other.dense[batch].get()) for other in later}
    dense = {other: other.dense[batch].get() for other in (*earlier, block)}
    return layer.run(batch, {**zero, **dense}, dense=True)


def is_added(layer: LayerPass, block: Block) -> bool:
    """Whether the block's output is simply added to the residual stream, in all processes.

    Tried once, on the dense states of a batch or two, with the blocks behind this one giving zero.
    Notes in the block whether the stream is nothing but a sum of blocks: streams are not run then.
    """
    if block.added is None:
        tried = [_try_sum(layer, batch, block) for batch in layer.trials]
        added, ends_sum = (all(holds) for holds in zip(*tried, strict=True))
        block.ends_sum = hold_everywhere(ends_sum, layer.store.device)
        block.added = hold_everywhere(added, layer.store.device)
    return block.added


def _try_sum(layer: LayerPass, batch: int, block: Block) -> tuple[bool, bool]:
    """Whether a block's output is added to the stream, and whether that is a sum of blocks."""
    earlier, later = layer.finder.around(block)
    own = block.dense[batch].get()
    rest = {other: other.dense[batch].get() for other in earlier}
    rest |= {other: torch.zeros_like(other.dense[batch].get()) for other in later}
    given = layer.run(batch, {**rest, block: own}, dense=True)
    parts = [own, *(other.dense[batch].get() for other in earlier), layer.dense[batch].get()]
    fits = all(part.numel() == given.numel() for part in parts)
    if fits and bool(_is_sum_of(given, [part.reshape(given.shape) for part in parts])):
        return True, True
    without = layer.run(batch, {**rest, block: torch.zeros_like(own)}, dense=True)
    fits = own.numel() == given.numel()
    return fits and bool(_is_sum(given, without, own.reshape(given.shape))), False


def _is_sum(total: Tensor, rest: Tensor, part: Tensor) -> Tensor:
    """Whether total = rest + part, but for the rounding of a few additions, on the device.

    Only elements where the rest is small are looked at: rounding is small there, while elsewhere
    massive activations may hide a difference.
    """
    rounding = 2 * torch.finfo(total.dtype).eps
    total, rest, part = (at_least_float32(one) for one in (total, rest, part))
    small = rest.abs() <= rest[:1].abs().median()
    size = total.abs() + rest.abs() + part.abs()
    lost, most = ((one * small).square().sum() for one in (total - rest - part, rounding * size))
    return lost <= most


def _is_sum_of(total: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Whether total = Σ parts in every element, but for the rounding of each addition."""
    lost = at_least_float32(total).clone()
    size = torch.zeros_like(lost)
    for part in parts:
        lost -= part
        size += part.abs()
    return (lost.abs() <= len(parts) * torch.finfo(total.dtype).eps * size).all()
