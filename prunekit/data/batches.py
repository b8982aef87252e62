"""Batches: keyword arguments of forward calls, their rows, their padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Batch = Mapping[str, Any]


Numbered = tuple[int, Batch]


def positions_of(batch: Batch) -> tuple[int, int]:
    """Rows and tokens of a batch; one token where its inputs have none."""
    for name in ("attention_mask", "input_ids", "inputs_embeds"):
        if isinstance(value := batch.get(name), Tensor) and value.ndim > 1:
            return value.shape[0], value.shape[1]
    return next(
        (len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1
    ), 1


def fresh(batch: Batch) -> Batch:
    """A copy that the model may write to."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def unpadded(batches: Sequence[Batch]) -> list[Batch]:
    """The rows of padded batches one by one, without their padding."""
    found: list[Batch] = []
    for batch in batches:
        mask = batch.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.bool().all():
            found.append(batch)
            continue
        for row, keep in enumerate(mask.bool()):
            own = {
                key: value[row : row + 1, keep]
                if isinstance(value, Tensor) and value.shape[:2] == mask.shape
                else value[row : row + 1]
                if isinstance(value, Tensor) and value.ndim and len(value) == len(mask)
                else value
                for key, value in batch.items()
            }
            found.append(own)
    return found


def batches(windows: Tensor, batch_size: int, device: Any) -> list[dict[str, Any]]:
    """Keyword arguments of a language model's forward calls."""
    chunks = windows.split(batch_size)
    return [{"input_ids": chunk.to(device), "use_cache": False} for chunk in chunks]
