"""Perplexity: exp of the mean next-token loss over windows of a text, in float32."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.errors import ConfigError, DataError
from prunekit.model.inputs import input_device
from prunekit.runtime.console import say, track
from prunekit.runtime.memory import run_within_memory
from prunekit.runtime.modes import evaluating

BATCH = 32  # windows in a forward pass to begin with


def perplexity(
    model: nn.Module,
    windows: Tensor,
    batch_size: int | None = None,
    name: str = "eval",
    device: torch.device | str | None = None,
    stride: int | None = None,
) -> float:
    """Perplexity of a causal language model on token windows int64 [N, T]; losses in float32, their
    sum in float64.

    Windows cut without overlap predict T − 1 tokens each. Those cut every `stride` tokens predict
    what no window before has, the first one all, the others their last `stride` tokens, with what
    is before them as context.

    Args:
        model: on one device, or spread over several by accelerate.
        windows: consecutive windows of one text.
        batch_size: windows in a forward pass; None: 32, halved while memory doesn't suffice.
        name: of the text, in messages.
        device: where inputs go; by default where the model wants them.
        stride: tokens from the beginning of one window to that of the next; T by default.

    Raises:
        DataError: the loss is not finite.
        ConfigError: memory doesn't suffice for the batch size asked for, or for one window.
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
            lambda size: _total(model, windows, size, name, device, stride),
            batch_size or BATCH,
            shrink,
            lambda _, size: say(f"out of memory: {size} windows at a time now"),
        )
    mean = total / predicted(windows, stride)
    if not math.isfinite(mean):
        raise DataError(
            f"the model's loss on {name} is {mean}: its weights or activations hold NaN or infinity"
        )
    return math.exp(min(mean, 700.0))


@torch.inference_mode()
def _total(
    model: nn.Module,
    windows: Tensor,
    size: int,
    name: str,
    device: torch.device | str,
    stride: int | None,
) -> float:
    """The sum of the losses."""
    total, first = torch.zeros((), dtype=torch.float64), True
    chunks = windows.split(size)
    for chunk in track(chunks, f"perplexity on {name}", len(chunks)):
        ids = chunk.to(device)
        logits: Any = model(input_ids=ids, use_cache=False).logits
        targets = ids[:, 1:].to(logits.device, copy=True)
        if stride is not None and stride < ids.shape[1]:
            targets[1 if first else 0 :, :-stride] = -100  # predicted by the window before
        first = False
        loss = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="sum"
        )
        total += loss.double().cpu()
    return total.item()


def predicted(windows: Tensor, stride: int | None = None) -> int:
    """How many tokens the windows [N, T] predict."""
    count, length = windows.shape
    return length - 1 + (count - 1) * min(stride or length, length - 1)


def protocol(windows: Tensor, stride: int | None = None) -> str:
    """What was measured, for the report."""
    length = windows.shape[1]
    if stride is None or stride >= length:
        return f"{windows.numel():,} tokens, windows of {length} without overlap, no context between them"
    tokens = predicted(windows, stride) + 1
    return f"{tokens:,} tokens, windows of {length} every {stride}, each predicting what those before it have not"
