"""Text to token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> Tensor:
    """Token ids, LongTensor [T], of a text of any length, with special tokens or without.

    The tokenizer is kept from warning that the text is longer than its model allows.
    """
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)
