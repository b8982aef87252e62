"""The training rows: instructions in the Alpaca format with the loss on the response, or plain
text; packed or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.data.corpora import load_records, text_of
from prunekit.data.tokens import encode
from prunekit.errors import DataError
from prunekit.recovery.settings import Recovery
from prunekit.runtime.console import say, track

IGNORED = -100
_CHUNK = 1000
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """Token ids [T] (int32) of one example; those before `first` are given, the others are
    predicted.
    """

    ids: Tensor
    first: int = 1

    @property
    def labels(self) -> Tensor:
        """[T]: the ids, `IGNORED` where nothing is predicted; the first token never is."""
        labels = self.ids.clone()
        labels[: self.first] = IGNORED
        return labels


Row = tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on and what is held out; `training` is a multiple of the global batch, filled
    with empty rows.
    """

    training: list[Row]
    validation: list[Row]
    examples: int

    @property
    def fingerprint(self) -> str:
        """Tells these rows from others."""
        hashed = hashlib.sha256()
        for example in (example for row in [*self.training, *self.validation] for example in row):
            hashed.update(
                f"{example.first} {len(example.ids)} ".encode() + example.ids.numpy().tobytes()
            )
        return hashed.hexdigest()[:32]


def load_data(
    recovery: Recovery, tokenizer: Any, known: Mapping[str, Mapping[str, Any]], seed: int
) -> Data:
    """The rows of a recovery, in an order that the seed decides.

    Those held out come first in it, so they stay the same for every `samples`.

    Raises:
        DataError: the corpus can't be loaded, lacks the fields its format needs, or leaves nothing
            to train on.
    """
    name = recovery.path or recovery.corpus
    records = load_records(name, "recovery", known)
    examples = examples_of(
        records, recovery, tokenizer, name, known.get(name, {}).get("field", "text")
    )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    held = (
        round(recovery.holdout * len(examples)) if recovery.holdout < 1 else int(recovery.holdout)
    )
    held = max(held, 1) if recovery.holdout else 0
    validation = [examples[i] for i in order[:held]]
    training = [examples[i] for i in order[held:]][: recovery.samples]
    if not training:
        raise DataError(
            f"recovery corpus {name}: {len(examples)} examples, {held} of them held out: none to train on"
        )
    rows: list[Row] = (
        pack(training, recovery.length) if recovery.pack else [(example,) for example in training]
    )
    rows += [(_empty(tokenizer),)] * (-len(rows) % recovery.batch_size)
    return Data(
        training=rows, validation=[(example,) for example in validation], examples=len(training)
    )


def examples_of(
    records: Sequence[Mapping[str, Any]],
    recovery: Recovery,
    tokenizer: Any,
    name: str,
    field: str = "text",
) -> list[Example]:
    """The records as examples of at most `recovery.length` tokens; says how many were left out."""
    if not records:
        raise DataError(f"recovery corpus {name}: it holds no records")
    if recovery.format == "alpaca" or (
        recovery.format == "auto" and all(map(_is_instruction, records))
    ):
        examples = _instructions(records, recovery.length, tokenizer, name)
    else:
        texts = [text for record in records if (text := text_of(record, field, name)).strip()]
        examples = (
            _joined(texts, recovery.length, tokenizer)
            if recovery.join
            else _texts(texts, recovery, tokenizer)
        )
    if not examples:
        raise DataError(
            f"recovery corpus {name}: nothing is left to predict in recovery.length={recovery.length} tokens"
        )
    return examples


def prompt_of(record: Mapping[str, Any]) -> str:
    """The Alpaca prompt of a record: everything before its response."""
    template = _WITH_INPUT if record.get("input") else _WITHOUT_INPUT
    return template.format(instruction=record["instruction"], input=record.get("input"))


def pack(examples: Sequence[Example], length: int) -> list[Row]:
    """Examples in their order, as many in a row as fit into `length` tokens."""
    rows: list[Row] = []
    room = 0
    for example in examples:
        if len(example.ids) <= room:
            rows[-1] = (*rows[-1], example)
        else:
            rows.append((example,))
            room = length
        room -= len(example.ids)
    return rows


def collate(rows: Sequence[Row], pad: int, packed: bool) -> dict[str, Tensor]:
    """`input_ids` and `labels` [N, T], padded on the right, with an `attention_mask` [N, T] of
    tokens.

    Packed rows have `position_ids` [N, T] instead: they start anew with every example and with the
    padding, and from that the model takes which tokens may see each other.
    """
    width = max(sum(len(example.ids) for example in row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORED)
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        end = sum(len(example.ids) for example in row)
        ids[i, :end] = torch.cat([example.ids for example in row])
        labels[i, :end] = torch.cat([example.labels for example in row])
        lengths = [*(len(example.ids) for example in row), width - end]
        positions[i] = torch.cat([torch.arange(length) for length in lengths])
        mask[i, :end] = 1
    batch = {"input_ids": ids, "labels": labels}
    return batch | ({"position_ids": positions} if packed else {"attention_mask": mask})


def pad_token(tokenizer: Any) -> int:
    """A token to fill rows with; it is never predicted nor seen."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def _empty(tokenizer: Any) -> Example:
    """An example without anything to predict."""
    return Example(ids=torch.full((2,), pad_token(tokenizer), dtype=torch.int32), first=2)


def _is_instruction(record: Mapping[str, Any]) -> bool:
    """Meant as one, though its response may be missing; some corpora also hold the whole as a text."""
    return isinstance(record.get("instruction"), str) and (
        "output" in record or "text" not in record
    )


def _instructions(
    records: Sequence[Mapping[str, Any]], length: int, tokenizer: Any, name: str
) -> list[Example]:
    for number, record in enumerate(records, start=1):
        if missing := [
            key for key in ("instruction", "output") if not isinstance(record.get(key), str)
        ]:
            raise DataError(
                f"recovery corpus {name}: record {number} has no text {missing[0]!r}, which recovery.format=alpaca "
                f"needs; it has: {', '.join(map(str, record))}"
            )
    answered = [record for record in records if record["output"].strip()]
    if not answered:
        raise DataError(
            f"recovery corpus {name}: every record's 'output' is empty, recovery.format=alpaca needs responses"
        )
    prompts = [prompt_of(record) for record in answered]
    asked = _tokens(prompts, tokenizer)
    whole = _tokens(
        [p + record["output"] for p, record in zip(prompts, answered, strict=True)], tokenizer
    )
    found = [
        _cut(Example(ids=_ended(ids, tokenizer), first=max(_common(question, ids), 1)), length)
        for question, ids in zip(asked, whole, strict=True)
    ]
    kept = [example for example in found if example.first < len(example.ids)]
    if len(kept) < len(records):
        left = len(records) - len(kept)
        say(
            f"recovery corpus {name}: {left} of {len(records)} records have no response in the first {length} tokens"
        )
    return kept


def _joined(texts: Sequence[str], length: int, tokenizer: Any) -> list[Example]:
    """Rows of `length` tokens of the documents joined by blank lines; the last one may be shorter."""
    ids = encode(tokenizer, "\n\n".join(texts), special=False).int()
    return [Example(ids=row.clone()) for row in ids.split(length) if len(row) > 1]


def _texts(texts: Sequence[str], recovery: Recovery, tokenizer: Any) -> list[Example]:
    """One document a row."""
    rows = [
        _cut(Example(ids=_ended(ids, tokenizer)), recovery.length)
        for ids in _tokens(texts, tokenizer)
    ]
    return [example for example in rows if len(example.ids) > 1]


def _tokens(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """The token ids of each text."""
    chunks = [list(texts[i : i + _CHUNK]) for i in range(0, len(texts), _CHUNK)]
    found: list[list[int]] = []
    for chunk in track(chunks, "tokenising", len(chunks)):
        found += tokenizer(chunk, verbose=False)["input_ids"]
    return found


def _ended(ids: list[int], tokenizer: Any) -> Tensor:
    """The ids with the end token, where the tokenizer has one and did not set it itself."""
    end = tokenizer.eos_token_id
    return torch.tensor(ids if end is None or ids[-1:] == [end] else [*ids, end], dtype=torch.int32)


def _common(question: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens at the start are the prompt's alone; one that spans the border is the
    response's.
    """
    pairs = zip(question, ids, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(question), len(ids)))


def _cut(example: Example, length: int) -> Example:
    return Example(ids=example.ids[:length].clone(), first=example.first)
