"""Targets: the outputs that a block's consumer must give on the inputs from pruned layers."""

from __future__ import annotations

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
    zero = {other: torch.zeros_like(other.dense[batch].get()) for other in later}
    dense = {other: other.dense[batch].get() for other in (*earlier, block)}
    pruned = {other: other.output(batch, layer.store) for other in earlier}
    stream = layer.run(batch, {**zero, **dense}, layer.dense[batch])
    without = layer.run(batch, {**zero, **pruned, block: torch.zeros_like(dense[block])})
    return at_least_float32(stream) - at_least_float32(without)


def is_added(layer: LayerPass, block: Block) -> bool:
    """Whether the block's output is simply added to the residual stream, in all processes.

    Tried on the dense states of the first batch, with the blocks behind this one giving zero.
    """
    earlier, later = layer.finder.around(block)
    own = block.dense[0].get()
    rest = {other: other.dense[0].get() for other in earlier}
    rest |= {other: torch.zeros_like(other.dense[0].get()) for other in later}
    given = layer.run(0, {**rest, block: own}, layer.dense[0])
    without = layer.run(0, {**rest, block: torch.zeros_like(own)}, layer.dense[0])
    holds = own.numel() == given.numel() and _is_sum(
        at_least_float32(given), at_least_float32(without), at_least_float32(own.view_as(given))
    )
    return hold_everywhere(holds, layer.store.device)


def _is_sum(total: Tensor, rest: Tensor, part: Tensor) -> bool:
    """Whether total = rest + part, but for rounding.

    Only elements where the rest is small are looked at: rounding is small there, while elsewhere
    massive activations may hide a difference.
    """
    small = rest.abs() <= rest.abs().median()
    lost, own = ((one * small).square().sum() for one in (total - rest - part, part))
    return bool(lost <= 0.01 * own)
