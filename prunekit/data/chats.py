"""Chats and instructions as text, by a tokenizer's chat template.

Records are known by their fields: `messages` (role and content), `conversations` (from and value),
`prompt` and `completion`, or Alpaca's `instruction`, `input` and `output`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from prunekit.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, str]  # role and content
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


def turns_of(record: Mapping[str, Any]) -> list[Turn] | None:
    """The turns of a record, each with `role` and `content`; None where it is no chat."""
    for field in ("messages", "conversations"):
        if _is_list(messages := record.get(field)):
            return _turns(messages)
    if {"prompt", "completion"} <= record.keys():
        return _exchange(record["prompt"], record["completion"])
    if {"instruction", "output"} <= record.keys():
        asked = [_text_of(record.get(field)) for field in ("instruction", "input")]
        return _exchange("\n".join(part for part in asked if part), record["output"])
    return None


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _turns(messages: Sequence[Any]) -> list[Turn] | None:
    """Messages with the roles that templates know; None where something is no message.

    A message has `role` and `content`, or `from` and `value`; one that calls tools may have none.
    """
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            return None
        role = message.get("role", message.get("from"))
        if role is None or not {"content", "value", "tool_calls"} & message.keys():
            return None
        content = _text_of(message.get("content", message.get("value")))
        turns.append({"role": _ROLES.get(str(role), str(role)), "content": content})
    return turns


def _text_of(content: Any) -> str:
    """The content of a message, which may be a part with a text or a list of parts, as text."""
    if _is_list(content):
        return "".join(map(_text_of, content))
    if isinstance(content, Mapping):
        return _text_of(content.get("text"))
    return "" if content is None else str(content)


def _exchange(asked: Any, answered: Any) -> list[Turn] | None:
    """A question and its answer; either may be a message, or a list of messages, already."""
    turns: list[Turn] = []
    for role, part in (("user", asked), ("assistant", answered)):
        message = part if isinstance(part, Mapping) else {"role": role, "content": part}
        if (found := _turns(part if _is_list(part) else [message])) is None:
            return None
        turns += found
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
