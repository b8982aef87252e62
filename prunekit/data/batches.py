"""Batches: the keyword arguments of forward calls, how they are made, their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import DataError
from prunekit.model.inputs import longest, rows_of_packed, without_cache

Batch = Mapping[str, Any]
_TEXT = {"input_ids", "attention_mask", "token_type_ids", "labels"}  # of a language model
Numbered = tuple[int, Batch]  # the number of a batch's first sample in its set, and the batch


def make_batches(
    model: nn.Module,
    calibration: Tensor | Iterable[Batch] | None,
    batch_size: int,
    device: torch.device,
) -> list[Batch]:
    """Make batches of the calibration set, with which the model keeps no key-value cache.

    Args:
        model: the model that the batches are for.
        calibration: token ids int64 [N, T] with T ≥ 2, which an encoder and a decoder both read; or
            keyword arguments of forward calls, which are taken as they are.
        batch_size: how many windows of token ids make a batch.
        device: where token ids go.

    Raises:
        DataError: no calibration data, or data that the model can't be called with.
    """
    if not isinstance(calibration, Iterable):
        raise DataError(
            f"calibration: expected token ids [N, T] or keyword-argument dicts, got {calibration!r}"
        )
    batches: list[Batch]
    if isinstance(calibration, Tensor):
        _check_token_ids(model, calibration)
        chunks = [chunk.to(device) for chunk in calibration.split(batch_size)]
        batches = [{"input_ids": chunk, **_decoded(model, chunk)} for chunk in chunks]
    else:
        batches = list(calibration)
    strangers = [type(batch).__name__ for batch in batches if not isinstance(batch, Mapping)]
    if strangers or not batches:
        raise DataError(
            "calibration: expected at least one dict of keyword arguments, "
            f"got {f'a {strangers[0]}' if strangers else 'none'}"
        )
    if not isinstance(calibration, Tensor):
        for batch in batches:
            _check_arguments(model, batch)
    return [without_cache(model, batch) for batch in batches]


def _decoded(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What the decoder of an encoder–decoder reads: the same tokens [N, T], one later."""
    config = getattr(model, "config", None)
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if not getattr(config, "is_encoder_decoder", False) or shift is None:
        return {}
    return {"decoder_input_ids": shift(labels=ids)}


def _check_token_ids(model: nn.Module, ids: Tensor) -> None:
    if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 2 or not len(ids):
        raise DataError(
            "calibration: expected int64 token ids [N, T] with T ≥ 2, "
            f"got {ids.dtype} {tuple(ids.shape)}"
        )
    _check_fit(model, ids)


def _check_arguments(model: nn.Module, batch: Batch) -> None:
    """Raise DataError for what no forward call takes: numpy's arrays, token ids out of range."""
    for name, value in batch.items():
        if type(value).__module__ == "numpy":
            raise DataError(
                f"calibration: {name}: expected a tensor, got numpy's {type(value).__name__}"
            )
    ids = batch.get("input_ids")
    tensors = {name for name, value in batch.items() if isinstance(value, Tensor)}
    if isinstance(ids, Tensor) and ids.ndim == 2 and tensors <= _TEXT:
        _check_fit(model, ids)


def _check_fit(model: nn.Module, ids: Tensor) -> None:
    """Raise DataError where token ids [N, T] are none of the model's, or more than it has places
    for.
    """
    embeddings: Any = None
    find: Any = getattr(model, "get_input_embeddings", lambda: None)
    with suppress(NotImplementedError):  # of a model without such a table
        embeddings = find()
    rows = getattr(embeddings, "num_embeddings", None)
    lowest, highest = int(ids.min()), int(ids.max())
    if rows and not 0 <= lowest <= highest < rows:
        raise DataError(
            f"calibration: expected token ids in [0, {rows}), got {lowest} to {highest}"
        )
    limit = longest(model)
    if limit is not None and ids.shape[1] > limit:
        raise DataError(
            f"calibration: expected at most the {limit} tokens the model was made for, "
            f"got {ids.shape[1]}"
        )


def count_positions(batch: Batch) -> tuple[int, int]:
    """Numbers of rows and of tokens in a row; one token where the inputs are no sequences."""
    for name in ("input_ids", "inputs_embeds", "attention_mask"):
        value = batch.get(name)
        # A mask [B or 1, heads or 1, T, T] does not begin with rows and tokens.
        most = 2 if name == "attention_mask" else 3
        if isinstance(value, Tensor) and 2 <= value.ndim <= most:
            return value.shape[0], value.shape[1]
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    return (len(tensors[0]) if tensors else 1), 1


def has_rows(batch: Mapping[str, Tensor], rows: int) -> bool:
    """Whether each argument can be split into this number of rows."""
    packed = rows_of_packed(batch, rows)
    return all(name in packed or len(value) == rows for name, value in batch.items())


def split_samples(batch: Batch) -> list[Batch]:
    """The rows of a batch, each as a batch of one."""
    rows, _ = count_positions(batch)
    return [take_rows(batch, [row]) for row in range(rows)]


def take_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """A batch of some rows of another one; values that have no row for each sample stay."""
    size, _ = count_positions(batch)
    packed = rows_of_packed(batch, size)
    own = {key: torch.cat([parts[row] for row in rows]) for key, parts in packed.items()}
    return {key: own.get(key, _take(value, list(rows), size)) for key, value in batch.items()}


def _take(value: Any, rows: list[int], size: int) -> Any:
    """These rows of a tensor that has `size` of them; any other value as it is."""
    by_row = isinstance(value, Tensor) and value.ndim and len(value) == size
    return value[rows] if by_row else value


def copy_batch(batch: Batch) -> Batch:
    """A copy that the model may write to."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def padding_mask(batch: Batch) -> Tensor | None:
    """BoolTensor [B, T], False where `input_ids` [B, T] are padding; None where none of them are.

    Read from an `attention_mask` [B, T]. One of more dimensions says who attends to whom, and not
    what is padding.
    """
    given = batch.get("attention_mask")
    if not isinstance(given, Tensor) or given.ndim != 2:
        return None
    mask = given.bool()
    return None if mask.all() else mask
