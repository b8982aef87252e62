"""Tensors that a checkpoint stores in parts: experts one by one, a gate beside its up projection.

transformers describes such a checkpoint by converters: patterns of the parts' names, and operations
that make one parameter of them. Here the operations only say where each part belongs; nothing is
read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch

from prunekit.checkpoint.shards import Composed, Shards, Stored
from prunekit.errors import CheckpointError, first_line

# Pattern and number (0 where nothing is numbered) → the name of the part in the shards.
Parts = dict[tuple[str, int], str]


def read_number(pattern: str, name: str) -> int:
    """The number in a name: 3 in `experts.3.up.weight`, of the pattern `experts.*.up.weight`."""
    if "*" not in pattern:
        return 0
    match = re.search(rf"(\d+){pattern.partition('*')[2]}", name)
    return int(match[1]) if match else 0


def compose(name: str, shape: torch.Size, converter: Any, parts: Parts, shards: Shards) -> Composed:
    """Where the tensors lie that a converter of transformers makes one parameter of.

    Args:
        name: the name of the parameter.
        shape: its shape in the model's class, which says how many parts are stacked.
        converter: transformers' patterns of the parts' names, and the operations on the parts.
        parts: the parts that are there.
        shards: the shards that they are in.

    Raises:
        CheckpointError: a part is missing or of another shape than the rest, or an operation does
            more than to lay them side by side.
    """
    stacked, joined = _dims(name, converter, shards)
    last = max(number for _, number in parts)
    last = last if stacked is None else max(last, shape[stacked] - 1)
    rows = []
    for pattern in converter.source_patterns:
        numbers = range(last + 1 if "*" in pattern else 1)
        if missing := [number for number in numbers if (pattern, number) not in parts]:
            name_missing = _name_missing(pattern, missing[0], parts)
            raise CheckpointError(f"{shards.where}: damaged weights: {name_missing} is missing")
        rows.append(tuple(_find_stored(shards, parts[pattern, number]) for number in numbers))
    if stacked is None:
        rows = [(part,) for row in rows for part in row]
    for row in rows:
        _check_alike(row)
    try:
        laid = [
            _meta(row[0])
            if stacked is None
            else torch.stack([_meta(part) for part in row], stacked)
            for row in rows
        ]
        whole = laid[0] if joined is None else torch.cat(laid, joined)
    except RuntimeError as error:
        raise CheckpointError(
            f"{shards.where}: damaged weights: {name}: {first_line(error)}"
        ) from error
    return Composed(
        folder=shards.where,
        rows=tuple(rows),
        stacked=stacked,
        joined=joined,
        shape=tuple(whole.shape),
        dtype=reduce(torch.promote_types, (part.dtype for row in rows for part in row)),
        widths=() if joined is None else tuple(row.shape[joined] for row in laid),
    )


def _dims(name: str, converter: Any, shards: Shards) -> tuple[int | None, int | None]:
    """Along which dimensions a converter stacks, then joins."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    operations = list(converter.operations)
    stacks = [op.dim for op in operations[:1] if type(op) is MergeModulelist]
    joins = [op.dim for op in operations[len(stacks) :] if type(op) is Concatenate]
    if (
        len(stacks) + len(joins) != len(operations)
        or len(joins) > 1
        or len(converter.target_patterns) > 1
    ):
        raise CheckpointError(
            f"{shards.where}: {name} is made by {', '.join(map(repr, operations))} "
            f"of {converter.source_patterns[0]}: such a checkpoint must be loaded whole"
        )
    return next(iter(stacks), None), next(iter(joins), None)


def _name_missing(pattern: str, number: int, parts: Mapping[tuple[str, int], str]) -> str:
    """The name that a missing part would have, after the name of one that is there."""

    def text(pattern: str, number: int) -> str:
        return (f"{number}{pattern.partition('*')[2]}" if "*" in pattern else pattern).replace(
            "\\", ""
        )

    (other, its), name = next(iter(parts.items()))
    missing = name.replace(text(other, its), text(pattern, number))
    return missing if missing != name else f"{pattern} beside {name}"


def _find_stored(shards: Shards, name: str) -> Stored:
    stored = shards[name]
    assert isinstance(stored, Stored)
    return stored


def _meta(part: Stored) -> torch.Tensor:
    return torch.empty(part.shape, device="meta")


def _check_alike(row: tuple[Stored, ...]) -> None:
    usual = Counter(part.shape for part in row).most_common(1)[0][0]
    if odd := [part for part in row if part.shape != usual]:
        raise CheckpointError(
            f"{odd[0].file}: {odd[0].name}: expected shape {usual}, got {odd[0].shape}"
        )
