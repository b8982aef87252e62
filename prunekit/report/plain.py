"""Frozen dataclasses as plain JSON values and back, and their JSON Schema, by their type hints.

A field without a default is always written, null included; one with the default None is left out
of the JSON while it is None. The items of a mapping declared by `flat_field` stand beside the other
keys.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from prunekit.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Type hint → the type's name in JSON Schema, and the Python types of its values.
_SCALARS: dict[object, tuple[str, tuple[type, ...]]] = {
    str: ("string", (str,)),
    bool: ("boolean", (bool,)),
    int: ("integer", (int,)),
    float: ("number", (int, float)),
}
# One entry under "Attributes:" of a docstring: a name, and text that may go over several lines.
_ATTRIBUTE = re.compile(r"^(?:Attributes:)?\s*(\w+): (.+?)(?=^\s*\w+: |\Z)", re.M | re.S)


def flat_field() -> Any:
    """A field of a mapping whose items stand beside the other keys of the JSON object."""
    return field(default_factory=dict, metadata={"flattened": True})


def to_plain(value: object) -> Any:
    """The value with every dataclass in it as a dict and every tuple as a list."""
    if is_dataclass(value) and not isinstance(value, type):
        return object_of(value)
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def object_of(value: DataclassInstance) -> dict[str, Any]:
    """The JSON object of a dataclass: its keys in the order of its fields."""
    plain: dict[str, Any] = {}
    for own in fields(value):
        item = getattr(value, own.name)
        if _is_flattened(own):
            plain |= to_plain(item)
        elif item is not None or _is_required(own):
            plain[own.name] = to_plain(item)
    return plain


def _is_flattened(own: Field[Any]) -> bool:
    return bool(own.metadata.get("flattened"))


def _is_required(own: Field[Any]) -> bool:
    return own.default is MISSING and own.default_factory is MISSING


def from_plain(kind: Any, value: object, where: str) -> Any:
    """The value as the type hint `kind`; `where` names its place in messages.

    Raises:
        DataError: another type, a key that is missing or that the dataclass does not know.
    """
    if kind is object or kind is Any:
        return value
    if (inner := _without_none(kind)) is not kind:
        return None if value is None else from_plain(inner, value, where)
    if is_dataclass(kind):
        return _read_object(kind, value, where)
    if kind in _SCALARS:
        name, accepted = _SCALARS[kind]
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise DataError(f"{where}: expected a JSON {name}, got {value!r:.80}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise DataError(f"{where}: expected a JSON array, got {value!r:.80}")
        item = get_args(kind)[0]
        return tuple(from_plain(item, each, f"{where}[{i}]") for i, each in enumerate(value))
    item = get_args(kind)[1]
    return {
        key: from_plain(item, each, f"{where}.{key}")
        for key, each in _check_object(value, where).items()
    }


def _without_none(kind: Any) -> Any:
    """X of `X | None`; any other hint as it is."""
    if get_origin(kind) not in (types.UnionType, typing.Union):
        return kind
    (inner,) = (part for part in get_args(kind) if part is not type(None))
    return inner


def _check_object(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: expected a JSON object, got {value!r:.80}")
    return value


def _read_object(kind: Any, value: object, where: str) -> Any:
    """A dataclass from a JSON object; null for a required key that is missing and may be null."""
    hints, rest = get_type_hints(kind), dict(_check_object(value, where))
    arguments: dict[str, Any] = {}
    for own in fields(kind):
        if _is_flattened(own):
            continue
        hint = hints[own.name]
        if own.name in rest:
            arguments[own.name] = from_plain(hint, rest.pop(own.name), f"{where}.{own.name}")
        elif _is_required(own):
            if _without_none(hint) is hint:
                raise DataError(f"{where}: expected the key {own.name}, got {list(rest)}")
            arguments[own.name] = None
    flat = next((own for own in fields(kind) if _is_flattened(own)), None)
    if flat is not None:
        arguments[flat.name] = from_plain(hints[flat.name], rest, where)
    elif rest:
        raise DataError(f"{where}: unknown key {next(iter(rest))!r}")
    return kind(**arguments)


def schema_of(kind: type) -> dict[str, Any]:
    """The JSON Schema (2020-12) of what `to_plain` makes of a dataclass."""
    definitions: dict[str, Any] = {}
    whole = _object_schema(kind, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": kind.__name__,
        **whole,
        "$defs": definitions,
    }


def _object_schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one dataclass, described by its docstring; its parts go to `definitions`."""
    summary, _, attributes = (inspect.getdoc(kind) or "").partition("\n\nAttributes:")
    described = {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(attributes)}
    hints = get_type_hints(kind)
    properties: dict[str, Any] = {}
    others: object = False  # no other keys
    for own in fields(kind):
        if _is_flattened(own):
            others = _schema(get_args(hints[own.name])[1], definitions)
            continue
        required = _is_required(own) or own.metadata.get("null")
        hint = hints[own.name] if required else _without_none(hints[own.name])
        described_as = {"description": described[own.name]} if own.name in described else {}
        properties[own.name] = {**_schema(hint, definitions), **described_as}
    return {
        "description": " ".join(summary.split("\n\n")[0].split()),
        "type": "object",
        "properties": properties,
        "required": [own.name for own in fields(kind) if _is_required(own)],
        "additionalProperties": others,
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> Any:
    """The schema of a type hint; dataclasses in it go to `definitions`."""
    if kind is object or kind is Any:
        return True
    if (inner := _without_none(kind)) is not kind:
        return {"anyOf": [_schema(inner, definitions), {"type": "null"}]}
    if is_dataclass(kind):
        name = typing.cast(type, kind).__name__
        if name not in definitions:
            definitions[name] = {}  # holds the place while its own parts are described
            definitions[name] = _object_schema(kind, definitions)
        return {"$ref": f"#/$defs/{name}"}
    if kind in _SCALARS:
        return {"type": _SCALARS[kind][0]}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _schema(get_args(kind)[0], definitions)}
    return {"type": "object", "additionalProperties": _schema(get_args(kind)[1], definitions)}
