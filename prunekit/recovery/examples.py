"""Examples to train on: instructions in the Alpaca format, or plain text.

Of an instruction, the loss is on the response alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from prunekit.data.corpora import text_of
from prunekit.data.encoding import encode_pieces
from prunekit.data.tokens import DENSEST
from prunekit.errors import DataError
from prunekit.recovery.settings import Recovery
from prunekit.runtime.console import say, track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Record = Mapping[str, Any]

IGNORED = -100  # the label of a token that is not predicted; cross entropy leaves it out
_CHUNK = 100  # texts that the tokenizer is given at once, which takes memory and shows no progress
_BEGUN = 4 * DENSEST  # characters a token, of a text that is cut off after some tokens
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """The tokens of one example.

    Attributes:
        ids: int32 [T].
        first: the tokens before this one are given, the others are predicted.
    """

    ids: Tensor
    first: int = 1

    @property
    def labels(self) -> Tensor:
        """The ids [T], with `IGNORED` where nothing is predicted; the first token never is."""
        labels = self.ids.clone()
        labels[: self.first] = IGNORED
        return labels


def make_examples(
    records: Sequence[Record],
    recovery: Recovery,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    field: str = "text",
) -> list[Example]:
    """The records as examples of at most `recovery.length` tokens; says how many were left out.

    Args:
        records: of the corpus.
        recovery: its `format`, `length` and `join` are used.
        tokenizer: the tokenizer of the model that is trained.
        corpus: its name, for messages.
        field: the records' field with the text, where they are plain text.

    Raises:
        DataError: records without the fields that the format needs, or nothing to predict in them.
    """
    if not records:
        raise DataError(f"recovery corpus {corpus}: expected records, found none")
    is_alpaca = recovery.format == "auto" and all(map(_is_instruction, records))
    if recovery.format == "alpaca" or is_alpaca:
        examples = _from_instructions(records, recovery.length, tokenizer, corpus)
    else:
        texts = [text for record in records if (text := text_of(record, field, corpus)).strip()]
        make = _from_joined if recovery.join else _from_documents
        examples = make(texts, recovery.length, tokenizer)
    if not examples:
        raise DataError(
            f"recovery corpus {corpus}: nothing is left to predict in "
            f"recovery.length={recovery.length} tokens"
        )
    return examples


def write_prompt(record: Record) -> str:
    """The Alpaca prompt of a record: everything before its response."""
    template = _WITH_INPUT if record.get("input") else _WITHOUT_INPUT
    return template.format(instruction=record["instruction"], input=record.get("input"))


def _is_instruction(record: Record) -> bool:
    """Whether a record is meant as an instruction, though its response may be missing.

    Some corpora have the whole of instruction and response as a text beside, which does not count.
    """
    has_form = "output" in record or "text" not in record
    return isinstance(record.get("instruction"), str) and has_form


def _from_instructions(
    records: Sequence[Record], length: int, tokenizer: PreTrainedTokenizerBase, corpus: str
) -> list[Example]:
    _check_fields(records, corpus)
    answered = [record for record in records if record["output"].strip()]
    if not answered:
        raise DataError(
            f"recovery corpus {corpus}: every record's 'output' is empty, "
            "recovery.format=alpaca needs responses"
        )
    prompts = (write_prompt(record) for record in track(answered, "tokenising"))
    texts = (write_prompt(record) + record["output"] for record in answered)
    given, whole = _tokenize(prompts, length, tokenizer), _tokenize(texts, length, tokenizer)
    examples: list[Example] = []
    for prompt, ids in zip(given, whole, strict=True):
        first = max(_count_common(prompt, ids), 1)
        example = Example(ids=_add_end(ids, tokenizer)[:length].clone(), first=first)
        if first < len(example.ids):
            examples.append(example)
    if missing := len(records) - len(examples):
        say(
            f"recovery corpus {corpus}: {missing} of {len(records)} records have no response in "
            f"the first {length} tokens"
        )
    return examples


def _check_fields(records: Sequence[Record], corpus: str) -> None:
    for number, record in enumerate(records, start=1):
        for key in ("instruction", "output"):
            if not isinstance(record.get(key), str):
                raise DataError(
                    f"recovery corpus {corpus}: record {number} has no text {key!r}, which "
                    f"recovery.format=alpaca needs; it has: {', '.join(map(str, record))}"
                )


def _from_joined(
    texts: Sequence[str], length: int, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """Rows of `length` tokens of the texts joined by blank lines; the last one may be shorter."""
    ids = torch.cat([*encode_pieces(tokenizer, "\n\n".join(texts))])
    return [Example(ids=row.clone()) for row in ids.split(length) if len(row) > 1]


def _from_documents(
    texts: Sequence[str], length: int, tokenizer: PreTrainedTokenizerBase
) -> list[Example]:
    """One text a row, cut off after `length` tokens."""
    tokenized = _tokenize(track(texts, "tokenising"), length, tokenizer)
    rows = [_add_end(ids, tokenizer)[:length].clone() for ids in tokenized]
    return [Example(ids=row) for row in rows if len(row) > 1]


def _tokenize(
    texts: Iterable[str], length: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    """The ids of each text, `length` of them at least where it has so many."""
    begun = (text[: _BEGUN * length] for text in texts)
    while chunk := list(islice(begun, _CHUNK)):
        yield from cast("list[list[int]]", tokenizer(chunk, verbose=False)["input_ids"])


def _add_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Add the end token to ids, if the tokenizer has one and has not added it itself."""
    end: Any = tokenizer.eos_token_id
    return torch.tensor(ids if end is None or ids[-1:] == [end] else [*ids, end], dtype=torch.int32)


def _count_common(prompt: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens at the start are the prompt's alone.

    A token that spans the border is the response's.
    """
    for at, (one, other) in enumerate(zip(prompt, ids, strict=False)):
        if one != other:
            return at
    return min(len(prompt), len(ids))
