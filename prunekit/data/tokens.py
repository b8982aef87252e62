"""Token windows of documents: random ones for calibration, consecutive ones for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DENSEST = 16  # characters: no tokenizer known to us packs more into a token on average


def calibration_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
) -> Tensor:
    """Cut random windows from random documents that are long enough.

    Where no document has `length` tokens, they are cut from all documents joined by blank lines.

    Args:
        documents: the texts.
        tokenizer: turns text into token ids, here without special tokens.
        samples: how many windows.
        length: tokens of a window.
        seed: of the random numbers.

    Returns:
        LongTensor [samples, length].

    Raises:
        DataError: no sample is asked for, or the whole text is shorter than one window.
    """
    if samples < 1 or length < 2:
        raise DataError(
            "data.calibration: expected samples ≥ 1 and sequence_length ≥ 2, "
            f"got {samples} and {length}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    long = _long_documents([documents[i] for i in order], tokenizer, samples, length)
    windows = []
    for i in range(samples):
        ids = long[i % len(long)]
        start = int(torch.randint(len(ids) - length + 1, (1,), generator=generator))
        windows.append(ids[start : start + length])
    return torch.stack(windows)


def _long_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int, length: int
) -> list[Tensor]:
    """Token ids of the first `most` documents that have at least `length` tokens.

    Where no document has so many: the token ids of all documents joined.
    """
    long: list[Tensor] = []
    for document in documents:
        ids = encode(tokenizer, document, special=False)
        if len(ids) >= length:
            long.append(ids)
        if len(long) == most:
            break
    if long:
        return long
    joined = encode(tokenizer, "\n\n".join(documents), special=False)
    if len(joined) < length:
        raise DataError(
            f"data.calibration: the text has {len(joined)} tokens, "
            f"one window needs {length} (sequence_length)"
        )
    return [joined]


def evaluation_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None,
    name: str,
    stride: int | None = None,
) -> Tensor:
    """Consecutive windows of the documents, joined by blank lines and tokenised once.

    Args:
        documents: the texts.
        tokenizer: turns text into token ids, with the special tokens that begin a text.
        length: tokens of a window.
        limit: use at most so many tokens; None: all.
        name: what the corpus is called, for the message.
        stride: tokens from the beginning of one window to that of the next; None: no overlap.

    Returns:
        LongTensor [N, length]; the tail that fills no window is dropped.

    Raises:
        DataError: the text is shorter than one window.
    """
    text = "\n\n".join(documents)
    if limit is not None:
        text = text[: limit * _DENSEST]
    ids = encode(tokenizer, text, special=True)[:limit]
    if len(ids) < length:
        raise DataError(
            f"eval corpus {name}: it has {len(ids)} tokens, one window needs {length} (eval.window)"
        )
    return ids.unfold(0, length, stride or length)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> Tensor:
    """Token ids, LongTensor [T], of a text of any length, with special tokens or without.

    The tokenizer is kept from warning that the text is longer than its model allows.
    """
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
