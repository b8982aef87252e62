"""The example inputs that a model is traced and checked with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def example_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Make a small example of a batch: two samples, of token ids the first eight of each."""

    def shrink(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        value = value[:2] if len(value) > 1 else torch.cat([value, value])
        return value[:, :8] if value.ndim == 2 and not value.is_floating_point() else value

    return {name: shrink(value) for name, value in batch.items()}
