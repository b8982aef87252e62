"""Size and speed of a model."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn


def size(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, int]:
    """`parameters` and `weight_bytes` (as stored in `dtype`, or in their own types); tied tensors count once."""
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    stored = sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters)
    return {"parameters": count, "weight_bytes": stored}


@torch.inference_mode()
def tokens_per_second(models: list[nn.Module], windows: Tensor, repeats: int = 5) -> list[float]:
    """Prefill speed on one batch of windows [N, T]: median of `repeats`, the models taking turns after a warm-up."""
    device: Any = next(models[0].parameters()).device
    ids = windows.to(device)
    times: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, own in zip(models, times, strict=True):
            began = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                own.append(time.perf_counter() - began)
    return [ids.numel() / statistics.median(own) for own in times]
