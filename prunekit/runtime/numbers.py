"""Number types: half precision is cast to a wider type before it is summed."""

from __future__ import annotations

import torch
from torch import Tensor


def is_half(dtype: torch.dtype) -> bool:
    """Whether a type is half precision: float16 or bfloat16."""
    return dtype in (torch.float16, torch.bfloat16)


def along(scores: Tensor, dim: int) -> Tensor:
    """Sum elementwise scores over all dims but one.

    Returns:
        float64 [size of that dim].
    """
    others = [d for d in range(scores.ndim) if d != dim]
    return scores.sum(others, dtype=torch.float64) if others else scores.double()


def widen(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32 for half precision; other types stay."""
    return torch.float32 if is_half(dtype) else dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast half precision to float32, in which its differences are exact; others stay."""
    return tensor.to(widen(tensor.dtype))
