"""A fast tokenizer as GGUF's vocabulary: `gpt2` for byte-level BPE, `llama` for SentencePiece.

The latter needs byte fallback. Where llama.cpp tokenises otherwise, the file can't change that: it
leaves out Unicode normalisation, and puts
SentencePiece's first space before a text that begins with one and after special tokens too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.errors import ExportError
from prunekit.exports.gguf.pretokenizer import pretokenizer_name
from prunekit.runtime.console import quiet, say

if TYPE_CHECKING:
    from gguf import GGUFWriter, SpecialVocab, TokenType
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space inside of a SentencePiece token


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, rows: int
) -> None:
    """Write a model's tokenizer.

    Args:
        writer: where it goes.
        tokenizer: a fast tokenizer of transformers.
        model: its config knows ids that the tokenizer doesn't.
        rows: the number of rows of the embedding; rows without a token get a placeholder.

    Raises:
        ExportError: no fast tokenizer, an algorithm other than BPE, or more tokens than rows.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ExportError(
            f"export=gguf needs the model's fast tokenizer (tokenizer.json), got {tokenizer!r:.60}"
        )
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _vocabulary_kind(stored)
    tokens = _tokens_by_row(tokenizer, rows)
    types = _token_types(tokens, stored, kind)
    merges, special = _special_vocabulary(tokenizer, model, rows)
    if not merges:
        raise ExportError("tokenizer: llama.cpp refuses a BPE vocabulary without merges")
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        ignores_merges = stored["model"]["ignore_merges"]
        writer.add_tokenizer_pre(pretokenizer_name(tokenizer.backend_tokenizer, ignores_merges))
        writer.add_token_list(_fill_rows(tokens))
        writer.add_token_merges(merges)
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_list(_fill_rows(_with_plain_spaces(tokens, types)))
        writer.add_token_scores(_merge_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(stored))
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def _vocabulary_kind(stored: Mapping[str, Any]) -> str:
    """llama.cpp's name for the algorithm of a tokenizer.json."""
    model = stored["model"]
    if model["type"] != "BPE":
        raise ExportError(f"tokenizer: export=gguf writes BPE vocabularies, got {model['type']}")
    if model.get("byte_fallback"):
        return "llama"
    if '"ByteLevel"' not in json.dumps(stored["pre_tokenizer"]):
        raise ExportError("tokenizer: llama.cpp's BPE works on bytes, this one's on characters")
    return "gpt2"


def _tokens_by_row(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str | None]:
    """The token of each row of the embedding; None for rows without one."""
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values())
    if largest >= rows:
        raise ExportError(
            f"tokenizer: its largest id is {largest}, but the embedding has {rows} rows"
        )
    tokens: list[str | None] = [None] * rows
    for token, index in vocabulary.items():
        tokens[index] = token
    return tokens


def _fill_rows(tokens: Sequence[str | None]) -> list[str]:
    """The tokens of all rows, with placeholders for rows that have no token."""
    return [f"[PAD{index}]" if token is None else token for index, token in enumerate(tokens)]


def _with_plain_spaces(
    tokens: Sequence[str | None], types: Sequence[TokenType]
) -> list[str | None]:
    """The tokens, where user-defined ones have plain spaces, as llama.cpp looks for them."""
    from gguf import TokenType

    return [
        token.replace(_SPACE, " ") if token and kind == TokenType.USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]


def _token_types(
    tokens: Sequence[str | None], stored: Mapping[str, Any], kind: str
) -> list[TokenType]:
    """llama.cpp's type of every row's token."""
    from gguf import TokenType

    types: dict[str | None, TokenType] = {None: TokenType.UNUSED}
    if kind == "llama":
        types |= {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    for added in stored["added_tokens"]:
        control = added["special"]
        types[added["content"]] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    if kind == "llama":
        types[stored["model"].get("unk_token") or "<unk>"] = TokenType.UNKNOWN
    return [types.get(token, TokenType.NORMAL) for token in tokens]


def _merge_scores(tokens: Sequence[str | None], merges: Sequence[str]) -> list[float]:
    """What SentencePiece merges by: the earlier a token is merged, the higher its score."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), index)
    return [-float(rank.get(token or "", len(merges))) for token in tokens]


def _adds_space(stored: Mapping[str, Any]) -> bool:
    """Whether a text gets a space at its beginning."""
    pipeline = json.dumps([stored["normalizer"], stored["pre_tokenizer"]])
    ways = ('"Prepend"', '"prepend_scheme": "first"', '"prepend_scheme": "always"')
    return any(way in pipeline for way in ways)


def _special_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, rows: int
) -> tuple[list[str], SpecialVocab]:
    """The merges; the ids of special tokens, which of them every text gets, and the chat templates.

    gguf reads them from a folder. It guesses from the post-processor which tokens a text gets, and
    so which one ends it; here a text is encoded instead.
    """
    from gguf import SpecialVocab

    ids = _special_ids(tokenizer, model)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        known = {f"{kind}_token_id": index for kind, index in ids.items()}
        (Path(folder) / "config.json").write_text(json.dumps(known), encoding="utf-8")
        with quiet("gguf.vocab"):
            special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    if ids.get("eos") is None:
        say(
            "tokenizer: neither it nor the model has a token for the end, llama.cpp takes one of "
            "its own for it"
        )
    kept = {kind: special.special_token_ids.get(kind) for kind in ("sep", "cls", "mask")}
    special.special_token_ids = ids | {kind: i for kind, i in kept.items() if i is not None}
    encoded = tokenizer("a").input_ids
    special.add_special_token = {
        "bos": "bos" in ids and encoded[0] == ids["bos"],
        "eos": "eos" in ids and encoded[-1] == ids["eos"],
    }
    # The caller writes the merges where they belong; asked for and empty, gguf would warn.
    merges, special.merges, special.load_merges = special.merges, [], False
    return merges, special


def _special_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, int]:
    """Kind of special token → its id: the tokenizer's, else the model's.

    The first id that ends a generation besides the end of a text is llama.cpp's end of a turn.
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else []
    config = model.config
    eos = _first_id(tokenizer.eos_token_id, config.eos_token_id, *ends)
    ids = {
        "bos": _first_id(tokenizer.bos_token_id, config.bos_token_id),
        "eos": eos,
        "unk": _first_id(tokenizer.unk_token_id),
        "pad": _first_id(tokenizer.pad_token_id, getattr(config, "pad_token_id", None)),
        "eot": _first_id(*(end for end in ends if end != eos)),
    }
    return {kind: index for kind, index in ids.items() if index is not None}


def _first_id(*candidates: int | list[int] | None) -> int | None:
    """The first candidate that is an id; a list stands for its members."""
    for candidate in candidates:
        for index in candidate if isinstance(candidate, list) else [candidate]:
            if isinstance(index, int) and index >= 0:
                return index
    return None
