"""A tokenizer with fewer tokens: those that texts need, and those that lead to them.

A text whose tokens all stay is encoded as before. Byte-pair encoding makes a token of a text by the
merges that make it of its own characters alone, lowest rank first: no merge that crosses its border
came before. So a token needs what lies on its way, and the merges among tokens that stay keep their
order. A unigram model (SentencePiece) takes the likeliest way through a text: a way that stays is
still the likeliest.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from prunekit.data.encoding import encode_pieces
from prunekit.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # documents that are read at a time
_SHORT = 5_000  # characters of a document that is encoded in one call with others
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True, kw_only=True, eq=False)
class ReducedVocabulary:
    """A tokenizer with fewer tokens.

    Attributes:
        tokenizer: a copy of the tokenizer, with the tokens that stay.
        kept: int64 [K], rising: the old id of each new id.
    """

    tokenizer: PreTrainedTokenizerBase
    kept: Tensor


def count_tokens(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, rows: int) -> Tensor:
    """How often each token occurs in the documents, int64 [rows], special tokens left out.

    Raises:
        DataError: the tokenizer has more tokens than the model's embedding has rows.
    """
    if len(tokenizer) > rows:
        raise DataError(
            f"tokenizer: expected at most the {rows} tokens of the model's embedding, "
            f"got {len(tokenizer)}"
        )
    counts = torch.zeros(rows, dtype=torch.long)
    rest = iter(documents)
    while part := list(islice(rest, _BATCH)):
        short = [text for text in part if len(text) <= _SHORT] or [""]
        encoded = tokenizer(short, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor([index for own in encoded for index in own], dtype=torch.long)
        pieces = (encode_pieces(tokenizer, text) for text in part if len(text) > _SHORT)
        for some in chain([ids], *pieces):
            counts += torch.bincount(some, minlength=rows)
    return counts


def reduce_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    used: Iterable[int],
    special: Iterable[int] = (),
    multiple: int = 1,
) -> ReducedVocabulary:
    """Keep the tokens that are used, what leads to them, bytes, and all added tokens.

    Args:
        tokenizer: a fast tokenizer; it stays as it is.
        used: ids of the tokens that must stay.
        special: ids that must stay even where the tokenizer has no token for them.
        multiple: unused tokens with the lowest ids stay as well, until the number of tokens is a
            multiple of it, as far as they lead to no other unused ones.

    Returns:
        The smaller tokenizer. It encodes a text as before if all tokens of the text stay.

    Raises:
        DataError: a tokenizer that is no fast one (tokenizer.json), or one of another algorithm
            than BPE and unigram, or whose ids can't be counted anew.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            "groups=vocabulary: expected a fast tokenizer (tokenizer.json), "
            f"got {type(tokenizer).__name__}"
        )
    stored = json.loads(backend.to_str())
    algorithm = _algorithm_of(stored)
    token_of = {index: token for token, index in backend.get_vocab().items()}
    missing = set(special) - token_of.keys()
    kept = {own["content"] for own in stored["added_tokens"]} | algorithm.always
    for index in (*used, *special):
        if index in token_of and token_of[index] not in kept:
            kept |= algorithm.needs(token_of[index])
    names = {token: index for index, token in token_of.items()}
    _fill_up(kept, names, algorithm, multiple, len(missing))
    old = sorted({names[token] for token in kept} | missing)
    new_ids = {index: place for place, index in enumerate(old)}
    smaller = _rewrite(stored, algorithm, kept, new_ids)
    _check_ids(smaller, {token: new_ids[names[token]] for token in kept})
    return ReducedVocabulary(tokenizer=_copy_with(tokenizer, smaller), kept=torch.tensor(old))


def _fill_up(
    kept: set[str], names: Mapping[str, int], algorithm: _Algorithm, multiple: int, others: int
) -> None:
    """Add unused tokens that need no other unused one, until the number is a multiple."""
    unused = sorted(names.keys() - kept, key=names.__getitem__)
    for token in unused:
        if (len(kept) + others) % multiple == 0:
            return
        if algorithm.needs(token) - {token} <= kept:
            kept.add(token)


class _Algorithm(ABC):
    """The part of a tokenizer.json that splits words into tokens.

    Attributes:
        model: that part.
        always: the tokens that any text may need.
    """

    def __init__(self, stored: Mapping[str, Any]) -> None:
        self.model: dict[str, Any] = stored["model"]
        self.always = self._always(json.dumps([stored["pre_tokenizer"], stored["normalizer"]]))

    @property
    @abstractmethod
    def tokens(self) -> Iterable[str]:
        """All tokens of the model."""

    @abstractmethod
    def needs(self, token: str) -> set[str]:
        """The token, and all tokens that it is made of on its way."""

    @abstractmethod
    def reduce(self, kept: set[str], new_ids: Mapping[int, int]) -> dict[str, Any]:
        """The same part with the tokens that are kept."""

    def _always(self, pipeline: str) -> set[str]:
        return {token for token in _BYTES if self.model.get("byte_fallback")} & set(self.tokens)


class _BytePairs(_Algorithm):
    """Byte-pair encoding, of bytes, or of characters as SentencePiece has it."""

    @property
    def tokens(self) -> Iterable[str]:
        return cast("dict[str, int]", self.model["vocab"])

    def _always(self, pipeline: str) -> set[str]:
        from tokenizers.pre_tokenizers import ByteLevel

        kept = super()._always(pipeline)
        if '"ByteLevel"' in pipeline:
            kept |= set(ByteLevel.alphabet()) & set(self.tokens)
        return kept | {token for token in self.tokens if token == self.model.get("unk_token")}

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The merges, in the order of their ranks."""
        pairs = (m.split(" ") if isinstance(m, str) else m for m in self.model["merges"])
        return [(left, right) for left, right in pairs]

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """Merge → its rank."""
        return {pair: rank for rank, pair in enumerate(self.merges)}

    def needs(self, token: str) -> set[str]:
        """What the merges make on the way to the token.

        It is the token alone where they lead elsewhere: such a token is added, or stands for a word
        as a whole (`ignore_merges`).
        """
        parts, made = list(token), set(token)
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                return {token}
            place = pairs.index(best)
            parts[place : place + 2] = ["".join(best)]
            made.add(parts[place])
        return made

    def reduce(self, kept: set[str], new_ids: Mapping[int, int]) -> dict[str, Any]:
        vocabulary = self.model["vocab"].items()
        left = {token: new_ids[index] for token, index in vocabulary if token in kept}
        merges = [list(pair) for pair in self.merges if {*pair, "".join(pair)} <= left.keys()]
        return {**self.model, "vocab": left, "merges": merges}


class _Unigram(_Algorithm):
    """SentencePiece's unigram model: tokens with scores."""

    @property
    def tokens(self) -> Iterable[str]:
        return [token for token, _ in self.model["vocab"]]

    def _always(self, pipeline: str) -> set[str]:
        """The unknown token too, and the one of the lowest score, which sets the score of that."""
        kept, pieces = super()._always(pipeline), self.model["vocab"]
        if self.model["unk_id"] is not None:
            kept.add(pieces[self.model["unk_id"]][0])
        return kept | {min(pieces, key=lambda piece: piece[1])[0]}

    def needs(self, token: str) -> set[str]:
        return {token}

    def reduce(self, kept: set[str], new_ids: Mapping[int, int]) -> dict[str, Any]:
        left = [piece for piece in self.model["vocab"] if piece[0] in kept]
        unknown = self.model["unk_id"]
        return {
            **self.model,
            "vocab": left,
            "unk_id": None if unknown is None else new_ids[unknown],
        }


def _algorithm_of(stored: Mapping[str, Any]) -> _Algorithm:
    model = stored["model"]
    affixes = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if model["type"] == "BPE" and not any(model.get(name) for name in affixes):
        return _BytePairs(stored)
    if model["type"] == "Unigram":
        return _Unigram(stored)
    raise DataError(
        "groups=vocabulary: expected a tokenizer of byte-pair encoding without affixes or dropout, "
        f"or a unigram one, got {model['type']}"
    )


def _rewrite(
    stored: Mapping[str, Any],
    algorithm: _Algorithm,
    kept: set[str],
    new_ids: Mapping[int, int],
) -> Tokenizer:
    """The tokenizer.json with the kept tokens under their new ids."""
    from tokenizers import Tokenizer

    padding = stored["padding"]
    if padding:
        padding = {**padding, "pad_id": new_ids[padding["pad_id"]]}
    smaller = {
        **stored,
        "model": algorithm.reduce(kept, new_ids),
        "added_tokens": [{**own, "id": new_ids[own["id"]]} for own in stored["added_tokens"]],
        "post_processor": _renumber(stored["post_processor"], new_ids),
        "padding": padding,
    }
    return Tokenizer.from_str(json.dumps(smaller))


def _renumber(part: Any, new_ids: Mapping[int, int]) -> Any:
    """A post-processor with new ids: `ids` of a template, or `sep` and `cls` that hold one each."""
    if isinstance(part, list):
        return [_renumber(item, new_ids) for item in part]
    if not isinstance(part, dict):
        return part
    renumbered = {key: _renumber(value, new_ids) for key, value in part.items()}
    for key in ("sep", "cls"):
        if isinstance(part.get(key), list):
            token, index = part[key]
            renumbered[key] = [token, new_ids[index]]
    if isinstance(part.get("ids"), list):
        renumbered["ids"] = [new_ids[index] for index in part["ids"]]
    return renumbered


def _check_ids(smaller: Tokenizer, expected: Mapping[str, int]) -> None:
    """Raise DataError where the library gives tokens other ids than those of the rows."""
    got = smaller.get_vocab()
    for token, index in expected.items():
        if got.get(token) != index:
            raise DataError(
                f"groups=vocabulary: token {token!r} should have id {index}, the smaller tokenizer "
                f"gives it {got.get(token)}: its added tokens are not counted on from its others"
            )


def _copy_with(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with another backend; no file of the old one is saved with it."""
    own: Any = copy.deepcopy(tokenizer)
    own._tokenizer = backend
    own._tokenizer.encode_special_tokens = own.split_special_tokens
    for name in ("vocab_file", "_vocab", "_merges", "_vocab_scores"):
        own.__dict__.pop(name, None)
    own.init_kwargs.pop("added_tokens_decoder", None)
    return cast("PreTrainedTokenizerBase", own)
