r"""Perplexity over windows of a text: the exponential of the mean next-token loss.

$$\mathrm{PPL} = \exp\left(-\frac1N \sum_t \log p(x_t \mid x_{<t})\right)$$

The losses are computed in float32 and added up in float64; N counts the predicted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain, islice
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
from prunekit.runtime.processes import gather_all, in_order, own_part, together

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
    shared: bool = False,
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
        shared: all processes call this at the same time, with the same model; each runs a part of
            the windows, and all return what one alone would.

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

    parts = list(enumerate(windows.split(batch_size or BATCH)))
    with together() if shared else nullcontext(), evaluating(model):
        losses = run_within_memory(
            lambda size: _list_losses(
                model, own_part(parts) if shared else parts, size, name, device, stride
            ),
            batch_size or BATCH,
            shrink,
            lambda _, size: say(f"out of memory: {size} windows at a time now"),
        )
    if shared:
        losses = in_order(gather_all(losses))
    # Added up in the order of the windows, so that processes that share them get the same sum.
    total = sum(chain.from_iterable(losses))
    mean = total / count_predicted(windows, stride)
    if not math.isfinite(mean):
        raise DataError(
            f"the model's loss on {name} is {mean}: its weights or activations hold NaN or infinity"
        )
    return math.exp(min(mean, _LARGEST_LOSS))


@torch.inference_mode()
def _list_losses(
    model: nn.Module,
    parts: Sequence[tuple[int, Tensor]],
    size: int,
    name: str,
    device: torch.device | str,
    stride: int | None,
) -> list[list[float]]:
    """The losses of all predicted tokens of each part, `size` windows in a forward pass.

    Args:
        model: a causal language model.
        parts: the number of each part of the text, and its windows [N, T].
        size: windows in a forward pass.
        name: the text's name in messages.
        device: where inputs go.
        stride: tokens from the beginning of one window to that of the next; None: T.
    """
    chunks = [
        (chunk, number == 0 and place == 0)
        for number, part in parts
        for place, chunk in enumerate(part.split(size))
    ]
    losses = [
        _loss_of(model, chunk.to(device), begins, stride)
        for chunk, begins in track(chunks, f"perplexity on {name}", len(chunks))
    ]
    # Fetched once: fetching each loss in the loop would wait for the GPU in every pass.
    fetched = iter(torch.stack(losses).tolist() if losses else [])
    return [list(islice(fetched, -(-len(part) // size))) for _, part in parts]


def _loss_of(model: nn.Module, ids: Tensor, begins: bool, stride: int | None) -> Tensor:
    """The sum of the losses of the tokens that windows [N, T] predict.

    Args:
        model: a causal language model.
        ids: the windows, int64 [N, T].
        begins: whether the first of them begins the text.
        stride: tokens from the beginning of one window to that of the next; None: T.
    """
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    targets = ids[:, 1:].to(logits.device, copy=True)
    if stride is not None and stride < ids.shape[1]:
        overlapping = targets[1:] if begins else targets  # nothing is before the first window
        overlapping[:, :-stride] = _IGNORED
    return F.cross_entropy(
        at_least_float32(logits[:, :-1]).flatten(0, 1), targets.flatten(), reduction="sum"
    )


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
