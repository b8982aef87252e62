"""Token windows of documents: random ones for calibration, consecutive ones for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from prunekit.data.encoding import encode
from prunekit.data.windows import draw_windows
from prunekit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DENSEST = 16  # characters: no tokenizer known to us packs more into a token on average


def calibration_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
) -> Tensor:
    """The token ids [samples, length] of the windows that `draw_windows` draws."""
    return draw_windows(documents, tokenizer, samples, length, seed).ids


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
        text = text[: limit * DENSEST]
    ids = encode(tokenizer, text, special=True, limit=limit)
    if len(ids) < length:
        raise DataError(
            f"eval corpus {name}: it has {len(ids)} tokens, one window needs {length} (eval.window)"
        )
    return ids.unfold(0, length, stride or length)
