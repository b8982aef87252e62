"""Perplexity: exp of the mean next-token loss over non-overlapping windows, in float32."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit.console import track
from prunekit.errors import DataError


@torch.inference_mode()
def perplexity(
    model: nn.Module,
    windows: Tensor,
    batch_size: int = 16,
    name: str = "eval",
    device: torch.device | str | None = None,
) -> float:
    """Perplexity of a causal language model on token windows [N, T]; T − 1 tokens of each are predicted.

    Inputs go to `device`: where the weights are by default, but weights that are read while it runs are nowhere before.

    Raises:
        DataError: the loss is not finite.
    """
    device = next(model.parameters()).device if device is None else device
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    try:
        chunks = windows.split(batch_size)
        for chunk in track(chunks, f"perplexity on {name}", len(chunks)):
            ids = chunk.to(device)
            logits: Any = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            total += loss.double().cpu()
    finally:
        model.train(training)
    mean = total.item() / (windows.numel() - len(windows))
    if not math.isfinite(mean):
        raise DataError(f"the model's loss on {name} is {mean}: its weights or activations hold NaN or infinity")
    return math.exp(min(mean, 700.0))


def protocol(windows: Tensor) -> str:
    """What was measured, for the report."""
    return f"{windows.numel():,} tokens, windows of {windows.shape[1]} without overlap, no context between them"
