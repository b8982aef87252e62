"""Chats and instructions as text, by a tokenizer's chat template.

Records are known by their fields: `messages` (role and content), `conversations` (from and value),
`prompt` and `completion`, or Alpaca's `instruction`, `input` and `output`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunekit.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]  # role and content
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


def turns_of(record: Mapping[str, Any]) -> list[Turn] | None:
    """The turns of a record, each with `role` and `content`; None where it is no chat."""
    if isinstance(messages := record.get("messages"), Sequence):
        return _turns(messages, "role", "content")
    if isinstance(messages := record.get("conversations"), Sequence):
        spoken = messages and "from" in messages[0]
        return _turns(messages, *(("from", "value") if spoken else ("role", "content")))
    if {"prompt", "completion"} <= record.keys():
        return _exchange(record["prompt"], record["completion"])
    if {"instruction", "output"} <= record.keys():
        asked = [record["instruction"], record.get("input", "")]
        return _exchange("\n".join(part for part in asked if part), record["output"])
    return None


def _turns(messages: Sequence[Mapping[str, Any]], role: str, content: str) -> list[Turn] | None:
    """Messages with the roles that templates know; None where a message lacks a field."""
    if not all({role, content} <= message.keys() for message in messages):
        return None
    return [
        {"role": _ROLES.get(str(m[role]), str(m[role])), "content": _text_of(m[content])}
        for m in messages
    ]


def _text_of(content: Any) -> str:
    """The content of a message, which may be a list of parts, as text."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return str(content or "")


def _exchange(asked: Any, answered: Any) -> list[Turn] | None:
    """A question and its answer; either may be a list of messages already."""
    turns: list[Turn] = []
    for role, part in (("user", asked), ("assistant", answered)):
        own = [{"role": role, "content": part}] if isinstance(part, str) else part
        turns += _turns(own, "role", "content") or []
    return turns or None


def render(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The text of a chat: by the tokenizer's chat template, or a line for each turn.

    Raises:
        DataError: the template refuses the chat.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(turn["content"] for turn in turns if turn["content"])
    assert tokenizer is not None
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False))
    except Exception as error:  # whatever a template raises
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"the chat template refuses a chat of {roles}: {first_line(error)}"
        ) from error
