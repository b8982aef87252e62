"""How a byte-level tokenizer cuts text before merging: llama.cpp has a list of ways, by name.

No file of a tokenizer holds such a name, and the package gguf has no list of them. So the name is
that of the way below that cuts sample texts as the tokenizer does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit.runtime.console import say

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Name → (the expressions one after the other, whether a piece that is a token is taken whole
# instead of merged from its bytes).
WAYS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_WORDS,), False),
    "llama-bpe": ((_CASELESS + "{1,3}" + _REST,), True),
    "smaug-bpe": ((_CASELESS + "{1,3}" + _REST,), False),
    "qwen2": ((_CASELESS + _REST,), False),
    "tekken": ((_CASED,), True),
    "smollm": ((r"\p{N}", _WORDS), False),
    "deepseek-coder": (
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
        False,
    ),
}
_SAMPLES = (
    "Hello world, it's 3 o'clock; WE'LL see'em at 10:30 or 12345678.",
    "def f(x):\n    return x**2  # square\n\n\n\tif x >= 3.14:\n\t\tpass\r\n",
    "  two spaces,   three   \n \n  and trailing   ",
    "https://example.org/a/b?c=d&e=%20 foo_bar fooBar FOOBar //\n/* x */\n",
    "Ça déjà vu: naïve Ünïcödé, Ελληνικά, русский язык, العربية, हिन्दी",
    "中文字符和日本語のテキスト、한국어 😀👍🏽 «quotes» – dashes … 1½ ²³ ٣٤",
    "!!! ??? ... $100 (50%) [a] {b} <|c|> 'd' \"e\" don't DON'T I'm i'M",
)


def pretokenizer_name(tokenizer: Tokenizer, ignores_merges: bool) -> str:
    """llama.cpp's name for the way in which a tokenizer cuts text before merging.

    Where it has none the nearest one is taken, and the user is told.

    Args:
        tokenizer: a tokenizer with byte-level BPE.
        ignores_merges: whether a piece that is a token as a whole isn't merged from its bytes.
    """
    own = [_cut(tokenizer.pre_tokenizer, sample) for sample in _SAMPLES]
    agreeing = {name: _compare(patterns, own) for name, (patterns, _) in WAYS.items()}
    name = max(agreeing, key=lambda way: (sum(agreeing[way]), WAYS[way][1] == ignores_merges))
    if not all(agreeing[name]):
        sample = _SAMPLES[agreeing[name].index(False)]
        say(
            "tokenizer: llama.cpp knows no pre-tokenizer that cuts text like this one's; "
            f"{name} comes nearest and differs on {sample!r}: give llama.cpp token ids where that "
            "matters"
        )
    return name


def _compare(patterns: tuple[str, ...], own: list[list[str]]) -> list[bool]:
    """For each sample, whether the expressions cut it as the tokenizer does."""
    way = build_pretokenizer(patterns)
    return [_cut(way, sample) == pieces for sample, pieces in zip(_SAMPLES, own, strict=True)]


def build_pretokenizer(patterns: tuple[str, ...]) -> PreTokenizer:
    """The pre-tokenizer that cuts by the expressions, one after the other, and writes bytes."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _cut(pretokenizer: PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in pretokenizer.pre_tokenize_str(text)]
