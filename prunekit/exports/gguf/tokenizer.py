"""A fast tokenizer as GGUF's vocabulary: `gpt2` for byte-level BPE, `llama` for SentencePiece's
with byte fallback.

What llama.cpp does otherwise stays so: it leaves out Unicode normalisation, and puts
SentencePiece's first space before a text that begins with one and after special tokens too.
"""

from __future__ import annotations

import json
from typing import Any

from prunekit.errors import ExportError
from prunekit.exports.gguf.pretokenizer import pretokenizer_name
from prunekit.runtime.console import say

_NORMAL, _UNKNOWN, _CONTROL, _ADDED, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's token types
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


def add_tokenizer(writer: Any, tokenizer: Any, model: Any, rows: int) -> None:
    """Write a model's tokenizer.

    Args:
        writer: a `gguf.GGUFWriter`.
        tokenizer: a fast tokenizer of transformers.
        model: its config knows ids that the tokenizer doesn't.
        rows: of the embedding; rows without a token get a placeholder.

    Raises:
        ExportError: no fast tokenizer, an algorithm other than BPE, or more tokens than rows.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ExportError(
            f"export=gguf needs the model's fast tokenizer (tokenizer.json), got {tokenizer!r:.60}"
        )
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = _kind(stored)
    tokens = _tokens(tokenizer, rows)
    merges = [
        " ".join(merge) if isinstance(merge, list) else merge for merge in stored["model"]["merges"]
    ]
    if not merges:
        raise ExportError("tokenizer: llama.cpp refuses a BPE vocabulary without merges")
    writer.add_tokenizer_model(kind)
    types = _types(tokens, stored, kind)
    if kind == "gpt2":
        writer.add_tokenizer_pre(
            pretokenizer_name(tokenizer.backend_tokenizer, stored["model"]["ignore_merges"])
        )
        writer.add_token_list(_placed(tokens))
        writer.add_token_merges(merges)
    else:
        writer.add_tokenizer_pre("default")
        spaced = [
            t.replace(_SPACE, " ") if t and types[i] == _ADDED else t for i, t in enumerate(tokens)
        ]
        writer.add_token_list(_placed(spaced))
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(stored))
    writer.add_token_types(types)
    _add_special(writer, tokenizer, model)


def _kind(stored: dict[str, Any]) -> str:
    model = stored["model"]
    if model["type"] != "BPE":
        raise ExportError(f"tokenizer: export=gguf writes BPE vocabularies, got {model['type']}")
    if model.get("byte_fallback"):
        return "llama"
    if '"ByteLevel"' not in json.dumps(stored["pre_tokenizer"]):
        raise ExportError("tokenizer: llama.cpp's BPE works on bytes, this one's on characters")
    return "gpt2"


def _tokens(tokenizer: Any, rows: int) -> list[str | None]:
    """Each row's token; None for rows without."""
    vocabulary = tokenizer.get_vocab()
    if (largest := max(vocabulary.values())) >= rows:
        raise ExportError(
            f"tokenizer: its largest id is {largest}, but the embedding has {rows} rows"
        )
    tokens: list[str | None] = [None] * rows
    for token, index in vocabulary.items():
        tokens[index] = token
    return tokens


def _placed(tokens: list[str | None]) -> list[str]:
    return [f"[PAD{index}]" if token is None else token for index, token in enumerate(tokens)]


def _types(tokens: list[str | None], stored: dict[str, Any], kind: str) -> list[int]:
    types: dict[str | None, int] = {None: _UNUSED}
    if kind == "llama":
        types |= {f"<0x{byte:02X}>": _BYTE for byte in range(256)}
    types |= {
        added["content"]: _CONTROL if added["special"] else _ADDED
        for added in stored["added_tokens"]
    }
    if kind == "llama":
        types[stored["model"].get("unk_token") or "<unk>"] = _UNKNOWN
    return [types.get(token, _NORMAL) for token in tokens]


def _scores(tokens: list[str | None], merges: list[str]) -> list[float]:
    """What SentencePiece merges by: the earlier a token is merged, the higher."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), index)
    return [-float(rank.get(token or "", len(merges))) for token in tokens]


def _adds_space(stored: dict[str, Any]) -> bool:
    """Whether a text gets a space at its beginning."""
    pipeline = json.dumps([stored["normalizer"], stored["pre_tokenizer"]])
    return (
        '"Prepend"' in pipeline
        or '"prepend_scheme": "first"' in pipeline
        or '"prepend_scheme": "always"' in pipeline
    )


def _add_special(writer: Any, tokenizer: Any, model: Any) -> None:
    """Ids of special tokens, which of them every text gets, the chat template."""
    config = model.config
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = ends if isinstance(ends, list) else []
    bos = _first(tokenizer.bos_token_id, config.bos_token_id)
    eos = _first(tokenizer.eos_token_id, config.eos_token_id, *ends)
    others = [end for end in ends if end != eos]
    if eos is None:
        say(
            "tokenizer: neither it nor the model has a token for the end, llama.cpp takes one of its own for it"
        )
    ids = {
        writer.add_bos_token_id: bos,
        writer.add_eos_token_id: eos,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: _first(
            tokenizer.pad_token_id, getattr(config, "pad_token_id", None)
        ),
        writer.add_eot_token_id: others[0] if others else None,
    }
    for add, index in ids.items():
        if index is not None:
            add(index)
    encoded = tokenizer("a").input_ids
    writer.add_add_bos_token(bos is not None and encoded[0] == bos)
    writer.add_add_eos_token(eos is not None and encoded[-1] == eos)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        named = template if isinstance(template, dict) else {"default": template}
        writer.add_chat_template([{"name": name, "template": text} for name, text in named.items()])


def _first(*ids: Any) -> int | None:
    """The first id that is one."""
    flat = [index for value in ids for index in (value if isinstance(value, list) else [value])]
    return next((index for index in flat if isinstance(index, int) and index >= 0), None)
