"""The rows of a recovery, packed or not, held out or trained on, and their batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.data.corpora import open_records
from prunekit.data.tokens import DENSEST
from prunekit.errors import DataError
from prunekit.recovery.examples import IGNORED, Example, make_examples
from prunekit.recovery.settings import Recovery
from prunekit.runtime.console import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = tuple[Example, ...]
_LEAST = 100_000_000  # characters: more than Alpaca has


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows of a recovery, to train on and to validate with.

    Attributes:
        training: rows, filled up with empty ones to a multiple of the global batch.
        validation: rows of one example each.
        examples: how many examples the training rows hold.
    """

    training: list[Row]
    validation: list[Row]
    examples: int

    @property
    def fingerprint(self) -> str:
        """A digest of all rows, of 32 hexadecimal digits."""
        hashed = hashlib.sha256()
        for row in (*self.training, *self.validation):
            for example in row:
                hashed.update(f"{example.first} {len(example.ids)} ".encode())
                hashed.update(example.ids.numpy().tobytes())
        return hashed.hexdigest()[:32]


def load_data(
    recovery: Recovery,
    tokenizer: PreTrainedTokenizerBase,
    known: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> Data:
    """The rows of a recovery, in an order that the seed decides.

    The first examples of this order are held out, so that they are the same for every `samples`.

    Args:
        recovery: the corpus, the format and the sizes.
        tokenizer: the tokenizer of the model that is trained.
        known: the configuration's `corpora`.
        seed: of the order.

    Raises:
        DataError: the corpus can't be loaded, lacks the fields its format needs, or leaves nothing
            to train on.
    """
    corpus = recovery.path or recovery.corpus
    own = None if recovery.samples is None else seed
    records = _take(open_records(corpus, "recovery", known, own), corpus, _enough(recovery))
    field = known.get(corpus, {}).get("field", "text")
    examples = make_examples(records, recovery, tokenizer, corpus, field)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    held = _count_held_out(recovery.holdout, len(examples))
    validation = [examples[i] for i in order[:held]]
    training = [examples[i] for i in order[held:]][: recovery.samples]
    if not training:
        raise DataError(
            f"recovery corpus {corpus}: {len(examples)} examples, {held} of them held out: none to "
            "train on"
        )
    rows = pack(training, recovery.length) if recovery.pack else _one_a_row(training)
    rows += [_empty_row(tokenizer)] * (-len(rows) % recovery.batch_size)
    return Data(training=rows, validation=_one_a_row(validation), examples=len(training))


def _take(records: Iterable[dict[str, Any]], corpus: str, characters: int) -> list[dict[str, Any]]:
    """Records that hold so many characters, of a corpus that is no list; says if there are more."""
    if isinstance(records, list):
        return records
    taken: list[dict[str, Any]] = []
    count = 0
    for record in records:
        if count >= characters:
            say(
                f"recovery corpus {corpus}: only {len(taken):,} records were read; "
                "recovery.samples=N reads as many as N examples need"
            )
            break
        taken.append(record)
        count += len(str(record))
    return taken


def _enough(recovery: Recovery) -> int:
    """Characters of a corpus that hold all examples that are asked for, `_LEAST` at least.

    A corpus of the hub that is smaller, or a file, is read as a whole, and the examples are drawn
    from among all.
    """
    examples = recovery.samples or 0
    examples += _count_held_out(recovery.holdout, examples)
    return max(_LEAST, examples * recovery.length * DENSEST)


def _count_held_out(holdout: float, examples: int) -> int:
    """How many examples to hold out: `holdout` itself, or that share if below 1, at least one."""
    if holdout >= 1:
        return int(holdout)
    return max(round(holdout * examples), 1) if holdout else 0


def _one_a_row(examples: Sequence[Example]) -> list[Row]:
    return [(example,) for example in examples]


def pack(examples: Sequence[Example], length: int) -> list[Row]:
    """Rows of examples in their order, as many in a row as fit into `length` tokens."""
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
    """Make a batch: `input_ids`, `labels` and a mask or positions, each int64 [N, T].

    Rows are padded on the right. The mask is the `attention_mask` of the tokens. Packed rows have
    `position_ids` instead, which start anew with every example and with the padding: the model
    derives from them which tokens may see each other.
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


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill rows with; no prediction depends on it."""
    candidates: list[Any] = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    return next((token for token in candidates if token is not None), 0)


def _empty_row(tokenizer: PreTrainedTokenizerBase) -> Row:
    """A row without anything to predict."""
    return (Example(ids=torch.full((2,), pad_token(tokenizer), dtype=torch.int32), first=2),)
