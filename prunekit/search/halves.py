"""Judging in bfloat16 on a CPU that multiplies it by itself, where the weights hold no more bits.

On a CPU, a model that is stored in half precision is loaded in float32, which is right for its
repair; but candidates are compared, by differences far above what bfloat16 rounds away.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def judges_in_halves(model: nn.Module) -> bool:
    """Whether a model lies on a CPU with products of bfloat16, and its float32 weights are such."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if not all(p.device.type == "cpu" and p.dtype == torch.float32 for p in weights):
        return False
    return _multiplies_bfloat16() and all(_is_bfloat16(p.detach()) for p in weights)


def computing_in_halves(enabled: bool) -> AbstractContextManager[object]:
    """Let matrix products of a CPU take bfloat16 in a `with` block; norms and sums stay wide."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def _is_bfloat16(weight: Tensor) -> bool:
    """Whether every value of a float32 tensor is one of bfloat16."""
    return torch.equal(weight.bfloat16().float(), weight)


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16: emulated, they are slow."""
    # The function is new: where torch lacks it, nothing is known, and float32 is computed in.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
