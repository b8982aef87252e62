r"""Perplexity over windows of a text: the exponential of the mean next-token loss.

$$\mathrm{PPL} = \exp\left(-\frac1N \sum_t \log p(x_t \mid x_{<t})\right)$$

The losses are computed in float32 and added up in float64; N counts the predicted tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.errors import ConfigError, DataError
from prunekit.model.inputs import input_device
from prunekit.runtime.console import say, track
from prunekit.runtime.memory import run_within_memory
from prunekit.runtime.modes import evaluating
from prunekit.runtime.numbers import at_least_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 32  # windows of the first forward pass, where none are asked for
_LARGEST_LOSS = 700.0  # exp of more is no float64
_IGNORED = -100  # the target that cross entropy leaves out


def perplexity(
    model: PreTrainedModel | nn.Module,
    windows: Tensor,
    batch_size: int | None = None,
    name: str = "eval",
    device: torch.device | str | None = None,
    stride: int | None = None,
) -> float:
    """Perplexity of a causal language model on token windows, int64 [N, T].

    Windows cut without overlap predict T − 1 tokens each. Of windows cut every `stride` tokens, the
    first one predicts all its tokens but one, the others their last `stride` tokens, with the
    tokens before as context: each token is predicted once.

    Args:
        model: on one device, or spread over several by accelerate.
        windows: consecutive windows of one text.
        batch_size: windows in a forward pass; None: 32, halved while memory does not suffice.
        name: the text's name in messages.
        device: where inputs go; by default where the model wants them.
        stride: tokens from the beginning of one window to that of the next; T by default.

    Raises:
        DataError: the loss is not finite.
        ConfigError: memory does not suffice for the batch size asked for, or for one window.
    """
    device = device or input_device(model)

    def shrink(size: int, error: Exception) -> int:
        if batch_size or size == 1:
            halves = f"eval.batch_size={size // 2}" if size > 1 else "a shorter eval.window"
            raise ConfigError(
                f"out of memory at eval.batch_size={size}: {halves} halves it"
            ) from error
        return size // 2

    with evaluating(model):
        total = run_within_memory(
            lambda size: _sum_losses(model, windows, size, name, device, stride),
            batch_size or BATCH,
            shrink,
            lambda _, size: say(f"out of memory: {size} windows at a time now"),
        )
    mean = total / count_predicted(windows, stride)
    if not math.isfinite(mean):
        raise DataError(
            f"the model's loss on {name} is {mean}: its weights or activations hold NaN or infinity"
        )
    return math.exp(min(mean, _LARGEST_LOSS))


@torch.inference_mode()
def _sum_losses(
    model: nn.Module,
    windows: Tensor,
    size: int,
    name: str,
    device: torch.device | str,
    stride: int | None,
) -> float:
    """The losses of all predicted tokens, `size` windows in a forward pass."""
    losses: list[Tensor] = []
    chunks = windows.split(size)
    for number, chunk in enumerate(track(chunks, f"perplexity on {name}", len(chunks))):
        ids = chunk.to(device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        targets = ids[:, 1:].to(logits.device, copy=True)
        if stride is not None and stride < ids.shape[1]:
            overlapping = targets if number else targets[1:]  # nothing is before the first window
            overlapping[:, :-stride] = _IGNORED
        losses.append(
            F.cross_entropy(
                at_least_float32(logits[:, :-1]).flatten(0, 1),
                targets.flatten(),
                reduction="sum",
            )
        )
    # Fetched once: fetching each loss in the loop would wait for the GPU in every pass.
    return float(sum(torch.stack(losses).tolist()))


def count_predicted(windows: Tensor, stride: int | None = None) -> int:
    """How many tokens the windows [N, T] predict."""
    count, length = windows.shape
    return length - 1 + (count - 1) * min(stride or length, length - 1)


def describe_protocol(windows: Tensor, stride: int | None = None) -> str:
    """How perplexity is measured on the windows [N, T], for the report."""
    length = windows.shape[1]
    if stride is None or stride >= length:
        return (
            f"{windows.numel():,} tokens, windows of {length} without overlap, no context between "
            "them"
        )
    tokens = count_predicted(windows, stride) + 1
    return (
        f"{tokens:,} tokens, windows of {length} every {stride}, each predicting what those before "
        "it have not"
    )
