"""Token windows of documents: random ones for calibration, consecutive ones for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import DataError


def calibration_windows(
    documents: Sequence[str], tokenizer: Any, samples: int, length: int, seed: int
) -> Tensor:
    """LongTensor [samples, length]: random crops of random documents that are long enough.

    Where no document has `length` tokens, crops of all documents joined by blank lines.

    Raises:
        DataError: the whole text is shorter than one window.
    """
    if samples < 1 or length < 2:
        raise DataError(
            "data.calibration: expected samples ≥ 1 and sequence_length ≥ 2, "
            f"got {samples} and {length}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    long: list[Tensor] = []
    for i in order:
        ids = encode(tokenizer, documents[i], special=False)
        if len(ids) >= length:
            long.append(ids)
        if len(long) == samples:
            break
    if not long:
        joined = encode(tokenizer, "\n\n".join(documents), special=False)
        if len(joined) < length:
            raise DataError(
                f"data.calibration: the text has {len(joined)} tokens, "
                f"one window needs {length} (sequence_length)"
            )
        long = [joined]
    windows = []
    for i in range(samples):
        ids = long[i % len(long)]
        start = int(torch.randint(len(ids) - length + 1, (1,), generator=generator))
        windows.append(ids[start : start + length])
    return torch.stack(windows)


def evaluation_windows(
    documents: Sequence[str],
    tokenizer: Any,
    length: int,
    limit: int | None,
    name: str,
    stride: int | None = None,
) -> Tensor:
    """LongTensor [N, length]: the documents joined by blank lines, tokenised once, cut every
    `stride` tokens.

    Without a stride there is no overlap; the tail is dropped; at most `limit` tokens where one is
    given.

    Raises:
        DataError: the text is shorter than one window.
    """
    text = "\n\n".join(documents)
    if limit is not None:
        text = text[
            : limit * 16
        ]  # no tokenizer here packs more than 16 characters into a token on average
    ids = encode(tokenizer, text, special=True)[:limit]
    if len(ids) < length:
        raise DataError(
            f"eval corpus {name}: it has {len(ids)} tokens, one window needs {length} (eval.window)"
        )
    return ids.unfold(0, length, stride or length)


def encode(tokenizer: Any, text: str, *, special: bool) -> Tensor:
    """Token ids [T] of a text, however long, without the tokenizer's warning about its maximum
    length.
    """
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
