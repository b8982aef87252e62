"""Number types: half precision is cast to a wider type before it is summed."""

from __future__ import annotations

from collections.abc import Mapping

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


def computing_type(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32 for half precision; other types stay."""
    return torch.float32 if is_half(dtype) else dtype


def first_false(flags: Mapping[str, Tensor]) -> str | None:
    """The name of the first flag that is False, or None. The device is waited for once."""
    if not flags:
        return None
    device = next(iter(flags.values())).device
    values = torch.stack([flag.to(device) for flag in flags.values()]).tolist()
    return next((name for name, value in zip(flags, values, strict=True) if not value), None)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast half precision to float32, in which its differences are exact; others stay."""
    return tensor.to(computing_type(tensor.dtype))
