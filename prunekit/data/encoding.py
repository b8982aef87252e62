"""Text to token ids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE = 500_000  # characters that are encoded at once: tokenizers take some 200 bytes for each
_CONTEXT = 1_000  # characters before a piece that its first tokens may depend on
# Where a text is cut, the first if it has any near: no token of a tokenizer known to us spans one.
_CUTS = (re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool, limit: int | None = None
) -> Tensor:
    """Token ids, LongTensor [T], of a text of any length, with special tokens or without.

    The tokenizer is kept from warning that the text is longer than its model allows. A long text
    is encoded piece by piece (`encode_pieces`), which takes less memory and gives the same ids.

    Args:
        tokenizer: turns text into token ids.
        text: of any length.
        special: with the tokens that a tokenizer puts before and after a text.
        limit: so many ids from the beginning; None: all.
    """
    if len(text) <= _PIECE:
        return torch.tensor(_ids(tokenizer, text, special), dtype=torch.long)[:limit]
    first, last = _special(tokenizer) if special else ([], [])
    pieces = [torch.tensor(first, dtype=torch.int32)]
    count = len(first)
    for piece in encode_pieces(tokenizer, text):
        pieces.append(piece)
        count += len(piece)
        if limit is not None and count >= limit:
            break
    return torch.cat([*pieces, torch.tensor(last, dtype=torch.int32)])[:limit].long()


def encode_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[Tensor]:
    """The ids of a text without special tokens, int32, a piece of some `_PIECE` characters each.

    Pieces end with a line or a word. Each but the first is encoded after the characters before it,
    whose ids are dropped then, so that the pieces together are the ids of the whole text.
    """
    start = context = end = 0
    while not end or start < len(text):  # one piece at least
        found = (cut.search(text, start + _PIECE, start + 2 * _PIECE) for cut in _CUTS)
        end = next((match.end() for match in found if match), start + _PIECE)
        ids, before = _ids(tokenizer, text[context:end]), _ids(tokenizer, text[context:start])
        if ids[: len(before)] != before:  # a token spans the cut
            ids, before = _ids(tokenizer, text[start:end]), []
        yield torch.tensor(ids[len(before) :], dtype=torch.int32)
        start, context = end, max(text.rfind("\n", 0, end - 1) + 1, end - _CONTEXT)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _special(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text."""
    whole, bare = _ids(tokenizer, "x", True), _ids(tokenizer, "x")
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []
