"""Measure tokens per second and memory of models, which take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.evaluation.cost import measure_size
from prunekit.model.inputs import input_device
from prunekit.runtime.console import track
from prunekit.runtime.memory import peak_memory, reset_peak
from prunekit.runtime.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_WARM = 4  # tokens decoded to warm up: a GPU loads and chooses its kernels in the first ones


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed and memory of models, each figure by the model's name.

    Attributes:
        prefill_tokens_per_second: of the forward pass over the prompts, which fills the cache.
        decode_tokens_per_second: of the tokens that follow, one forward pass each.
        peak_bytes: a model's weights, and what its forward passes took beyond what was there before
            them.
        protocol: how it was measured, in words.
    """

    prefill_tokens_per_second: Mapping[str, float]
    decode_tokens_per_second: Mapping[str, float]
    peak_bytes: Mapping[str, int]
    protocol: str

    def to_json(self) -> dict[str, Any]:
        """The report's keys on speed and memory."""
        return {
            "evaluation_bytes": dict(self.peak_bytes),
            "latency": {
                "prefill_tokens_per_second": dict(self.prefill_tokens_per_second),
                "decode_tokens_per_second": dict(self.decode_tokens_per_second),
                "protocol": self.protocol,
            },
        }


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Seconds that one turn of one model took to prefill and to decode, and bytes of memory."""

    prefill: float
    decode: float
    peak_bytes: int


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    batch: int = 1,
    prompt: int = 128,
    new: int = 32,
    repeats: int = 5,
) -> Speed:
    """Tokens a second of prefill and of decoding, and memory at the peak.

    The models take turns, so that what slows the machine down slows all of them. A short turn of
    each before only warms up.

    Args:
        models: name → causal language model, each on its device.
        batch: sequences at a time.
        prompt: tokens that each sequence begins with.
        new: tokens that follow, one forward pass each, with the cache.
        repeats: turns of each model that are timed; their median counts.
    """
    timed: dict[str, list[Turn]] = {name: [] for name in models}
    for model in models.values():
        _take_turn(model, batch, prompt, min(new, _WARM))
    order = [name for _ in range(repeats) for name in models]
    for name in track(order, "tokens/s", len(order)):
        timed[name].append(_take_turn(models[name], batch, prompt, new))
    return Speed(
        prefill_tokens_per_second={
            name: batch * prompt / statistics.median(turn.prefill for turn in own)
            for name, own in timed.items()
        },
        decode_tokens_per_second={
            name: batch * new / statistics.median(turn.decode for turn in own)
            for name, own in timed.items()
        },
        peak_bytes={
            name: max((turn.peak_bytes for turn in own), default=0) for name, own in timed.items()
        },
        protocol=f"batch {batch}, {prompt} tokens, then {new} one by one with the cache; "
        f"median of {repeats} turns",
    )


def _take_turn(model: PreTrainedModel, batch: int, prompt: int, new: int) -> Turn:
    device = input_device(model)
    reset_peak(device)
    before = _bytes_in_use(device)
    ids = torch.zeros(batch, prompt, dtype=torch.long, device=device)
    with evaluating(model):
        prefill, decode = _time_passes(model, ids, new)
    own = measure_size(model).weight_bytes
    return Turn(prefill=prefill, decode=decode, peak_bytes=peak_memory(device) - before + own)


def _time_passes(model: nn.Module, ids: Tensor, new: int) -> tuple[float, float]:
    """Seconds of filling the cache with ids [N, T], and of `new` steps with it."""
    began = _now(ids.device)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    filled = _now(ids.device)
    for _ in range(new):
        cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
    return filled - began, _now(ids.device) - filled


def _now(device: torch.device) -> float:
    """The time after the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _bytes_in_use(device: torch.device) -> int:
    """Memory in use now, as `peak_memory` counts it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)
