"""Size, arithmetic, memory and speed of a model."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.model.inputs import input_device
from prunekit.runtime.console import track
from prunekit.runtime.memory import peak_memory, reset_peak
from prunekit.runtime.modes import evaluating


def size(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, int]:
    """`parameters` and `weight_bytes` (as stored in `dtype`, or in their own types); tied tensors
    count once.
    """
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    stored = sum(p.numel() * (dtype or p.dtype).itemsize for p in parameters)
    return {"parameters": count, "weight_bytes": stored}


@torch.inference_mode()
def macs(
    model: nn.Module, tokens: int = 64, device: torch.device | str | None = None
) -> dict[str, int]:
    """Multiply-adds of one forward pass of `tokens` tokens: of each kind of module, and "total".

    torch's `FlopCounterMode` counts, two operations a multiply-add, every product spelled out:
    attention as two of full width, causal or not; a mixture's chosen experts one by one. A kind is
    a path with its layers' numbers left out ("model.layers.*.mlp"), down to what each layer, or the
    model, is made of.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(1, tokens, dtype=torch.long, device=device or input_device(model))
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        _experts_apart(model),
        evaluating(model),
    ):
        model(input_ids=ids, use_cache=False)
    kinds: dict[str, int] = {}
    for path in dict(model.named_modules()):
        if not (parts := _kind(model, path)):
            continue
        counted = sum(counter.get_flop_counts().get(f"{type(model).__name__}.{path}", {}).values())
        kinds[parts] = kinds.get(parts, 0) + counted // 2
    return {
        **{kind: count for kind, count in kinds.items() if count},
        "total": counter.get_total_flops() // 2,
    }


def _kind(model: nn.Module, path: str) -> str | None:
    """The kind a module is counted as: a layer's child, or one of the model that holds no layers;
    else None.
    """
    if not path:
        return None
    parts = path.split(".")
    inside = [i for i, part in enumerate(parts) if part.isdigit()]
    if inside:
        return (
            re.sub(r"\.\d+\.", ".*.", path)
            if inside[0] == len(parts) - 2 and len(inside) == 1
            else None
        )
    holds = lambda name: any(  # noqa: E731
        isinstance(m, nn.ModuleList) for m in model.get_submodule(name).modules()
    )
    if holds(path) or (len(parts) > 1 and not holds(".".join(parts[:-1]))):
        return None
    return path


@contextmanager
def _experts_apart(model: Any) -> Iterator[None]:
    """Experts computed one by one during a `with` block, where transformers would group them."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "_experts_implementation", None)
    if before is None:
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = before


@torch.inference_mode()
def speed(
    models: Mapping[str, nn.Module],
    batch: int = 1,
    prompt: int = 128,
    new: int = 32,
    repeats: int = 5,
) -> dict[str, Any]:
    """Tokens/s of prefill and of decode, and bytes of memory at the peak, of models that take turns
    after a warm-up.

    Args:
        models: name → causal language model, each on its device.
        batch: sequences at a time.
        prompt: tokens each has to begin with: one forward pass, which fills the cache.
        new: tokens that follow, one forward pass each, with the cache.
        repeats: turns that are timed; their median counts.

    Returns:
        `prefill_tokens_per_second`, `decode_tokens_per_second`, `peak_bytes` (a model's weights and
        what its passes took beyond what was there before), each name → figure; and `protocol`.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks: dict[str, int] = dict.fromkeys(models, 0)
    turns = [(turn, name) for turn in range(repeats + 1) for name in models]
    for turn, name in track(turns, "tokens/s", len(turns)):
        device = input_device(models[name])
        reset_peak(device)
        before = _held(device)
        with evaluating(models[name]):
            times = _once(
                models[name], torch.zeros(batch, prompt, dtype=torch.long, device=device), new
            )
        if turn:
            seconds[name].append(times)
            own = size(models[name])["weight_bytes"]
            peaks[name] = max(peaks[name], peak_memory(device) - before + own)
    median = {
        name: [statistics.median(each) for each in zip(*own, strict=True)]
        for name, own in seconds.items()
    }
    return {
        "prefill_tokens_per_second": {
            name: batch * prompt / first for name, (first, _) in median.items()
        },
        "decode_tokens_per_second": {
            name: batch * new / second for name, (_, second) in median.items()
        },
        "peak_bytes": peaks,
        "protocol": f"batch {batch}, {prompt} tokens, then {new} one by one with the cache; median of {repeats} turns",
    }


def _once(model: Any, ids: Tensor, new: int) -> tuple[float, float]:
    """Seconds of filling the cache, and of `new` steps."""
    began = _now(ids.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    filled = _now(ids.device)
    for _ in range(new):
        cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
    return filled - began, _now(ids.device) - filled


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _held(device: torch.device) -> int:
    """Bytes in use now, as `peak_memory` counts them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)


def odd_widths(model: nn.Module, of: int = 8) -> set[str]:
    """Names of the matrices with a side that is no multiple of `of`, which tensor cores want."""
    weights = ((name, p) for name, p in model.named_parameters() if p.ndim >= 2)
    return {name for name, weight in weights if any(side % of for side in weight.shape[-2:])}
