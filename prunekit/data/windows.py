"""Calibration windows: drawn at random over all of a text, however long its documents are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.data.encoding import encode
from prunekit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEPARATOR = "\n\n"  # between documents that share a window
_NEGLIGIBLE = 0.1  # short documents that hold no more of the text than this are left out


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Windows of token ids, and what they were drawn from.

    Args:
        ids: int64 [samples, length].
        documents: how many documents they hold tokens of.
        available: how many tokens the text has that they were drawn from.
    """

    ids: Tensor
    documents: int
    available: int

    @cached_property
    def distinct_tokens(self) -> int:
        """How many different tokens occur."""
        return len(self.ids.unique())

    @property
    def origin(self) -> str:
        """Where the windows come from, in words."""
        count = f"{self.documents:,} document{'s' if self.documents != 1 else ''}"
        return f"{self.ids.numel():,} tokens of {count}, {self.distinct_tokens:,} of them different"

    @property
    def warning(self) -> str | None:
        """What is wrong with the windows, in a sentence; None where nothing is."""
        repeated = len(self.ids) - len(self.ids.unique(dim=0))
        if not repeated and self.ids.numel() <= self.available:
            return None
        what = "the windows overlap"
        if repeated:
            what = f"{repeated} of the {len(self.ids)} windows repeat others"
        return (
            f"data.calibration: {what}: they hold {self.ids.numel():,} tokens, the text has "
            f"{self.available:,}; give more text, or fewer samples"
        )


@dataclass(frozen=True, eq=False)
class _Piece:
    """Token ids [T] to cut windows from, and the document that each comes from; −1: from none."""

    ids: Tensor
    owners: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def draw_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
) -> Windows:
    """Draw random windows over all documents, in random order.

    A document gives one window while there are others. Short documents share windows, joined by
    blank lines, unless nearly all of the text is in long ones. Where the text has too few documents
    for that, each gives as many windows as it has a share of the text.

    Args:
        documents: the texts; what is no list comes in random order, and is read until it suffices.
        tokenizer: turns text into token ids, here without special tokens.
        samples: how many windows.
        length: tokens of a window.
        seed: of the random numbers.

    Raises:
        DataError: no sample is asked for, or the whole text is shorter than one window.
    """
    if samples < 1 or length < 2:
        raise DataError(
            "data.calibration: expected samples ≥ 1 and sequence_length ≥ 2, "
            f"got {samples} and {length}"
        )
    generator = torch.Generator().manual_seed(seed)
    numbered: Iterable[tuple[int, str]] = enumerate(documents)
    if isinstance(documents, Sequence):
        order = torch.randperm(len(documents), generator=generator).tolist()
        numbered = ((i, documents[i]) for i in order)
    encoded = (_whole(encode(tokenizer, text, special=False), i) for i, text in numbered)
    separator = _whole(encode(tokenizer, _SEPARATOR, special=False), -1)
    pieces = _collect(encoded, separator, samples, length)
    windows = []
    for piece in _allot(pieces, samples):
        start = int(torch.randint(len(piece) - length + 1, (1,), generator=generator))
        window = slice(start, start + length)
        windows.append(_Piece(piece.ids[window], piece.owners[window]))
    owners = torch.cat([window.owners for window in windows]).unique()
    return Windows(
        ids=torch.stack([window.ids for window in windows]),
        documents=int((owners >= 0).sum()),
        available=sum(map(len, pieces)),
    )


def mix_windows(parts: Sequence[Windows], seed: int) -> Windows:
    """The windows of several corpora as one set, in an order that the seed decides."""
    if len(parts) == 1:
        return parts[0]
    ids = torch.cat([part.ids for part in parts])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return Windows(
        ids=ids[order],
        documents=sum(part.documents for part in parts),
        available=sum(part.available for part in parts),
    )


def _whole(ids: Tensor, document: int) -> _Piece:
    return _Piece(ids, torch.full_like(ids, document, dtype=torch.int32))


@dataclass(eq=False)
class _Collection:
    """Documents as pieces to cut windows of `length` tokens from.

    `pieces`: long documents and packs of short ones, as they were completed. `long`, `short`: the
    documents. `pack`: short ones that do not fill a window yet.
    """

    separator: _Piece
    length: int
    pieces: list[_Piece] = field(default_factory=list)
    long: list[_Piece] = field(default_factory=list)
    short: list[_Piece] = field(default_factory=list)
    pack: list[_Piece] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)

    def add(self, document: _Piece) -> None:
        """Take in a document; short ones are packed."""
        if len(document) >= self.length:
            self.tokens["long"] += len(document)
            self.long.append(document)
            self.pieces.append(document)
        elif len(document):
            self.tokens["short"] += len(document)
            self.short.append(document)
            self.pack += [self.separator, document] if self.pack else [document]
            if sum(map(len, self.pack)) >= self.length:
                self.pieces.append(_join(self.pack, self.length))
                self.pack = []

    @property
    def is_long(self) -> bool:
        """Whether hardly any of the text is in short documents."""
        return self.tokens["short"] <= _NEGLIGIBLE * self.tokens.total()

    def whole_text(self) -> list[_Piece]:
        """The long documents, and the short ones as one piece where they matter and fill a window.

        Raises:
            DataError: nothing fills a window.
        """
        if self.long and self.is_long:
            return self.long
        joined = _join([part for own in self.short for part in (self.separator, own)][1:])
        if not self.long and len(joined) < self.length:
            raise DataError(
                f"data.calibration: the text has {len(joined)} tokens, "
                f"one window needs {self.length} (sequence_length)"
            )
        return self.long + [joined] * (len(joined) >= self.length)


def _collect(
    documents: Iterable[_Piece], separator: _Piece, samples: int, length: int
) -> list[_Piece]:
    """Pieces of `length` tokens at least: one for each window, or all of the text."""
    collection = _Collection(separator, length)
    for document in documents:
        collection.add(document)
        if len(collection.pieces) >= samples and not collection.is_long:
            return collection.pieces
        if len(collection.long) == samples:
            return collection.long
    return collection.whole_text()


def _join(parts: Sequence[_Piece], length: int | None = None) -> _Piece:
    """The parts one after another, and no more of them than `length` tokens."""
    if not parts:
        return _whole(torch.empty(0, dtype=torch.long), -1)
    ids, owners = (torch.cat(own) for own in zip(*((p.ids, p.owners) for p in parts), strict=True))
    return _Piece(ids[:length], owners[:length])


def _allot(pieces: Sequence[_Piece], samples: int) -> list[_Piece]:
    """The piece that each window is cut from: as often as its share of the tokens, in turns."""
    if len(pieces) >= samples:
        return list(pieces[:samples])
    total = sum(map(len, pieces))
    shares = [samples * len(piece) / total for piece in pieces]
    counts = [int(share) for share in shares]
    rest = sorted(range(len(pieces)), key=lambda i: counts[i] - shares[i])
    for i in rest[: samples - sum(counts)]:
        counts[i] += 1
    return [
        piece
        for turn in range(max(counts))
        for piece, count in zip(pieces, counts, strict=True)
        if turn < count
    ]
