"""Checks before a model is saved: does its config lead back to it, and what must it state?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import CheckpointError, first_line
from prunekit.model.build import (
    adopt,
    build_dense,
    build_pruned,
    make_dense_config,
    needs_prunekit,
)
from prunekit.model.compat import decode_floats, follows_length, let_save_itself
from prunekit.model.modeling_prunekit import empty_sublayers
from prunekit.model.record import RECORD, make_record, stock_class

_NOT_SAVED = "a model cut like this can't be saved"


class _OtherShape(CheckpointError):
    """The class can't hold the weights, which transformers' own loader would notice as well."""


def required_record(model: nn.Module) -> dict[str, Any] | None:
    """The record that a folder must hold; None where transformers' own class makes all sizes.

    Args:
        model: the model to save; its weights may be on meta.

    Raises:
        CheckpointError: the class refuses the sizes; or it would take the weights and compute with
            other numbers, without an error where the folder is loaded without prunekit.
    """
    if not _is_stock(model):
        if empty := next(iter(empty_sublayers(model)), None):
            raise CheckpointError(
                f"{empty}: it has no units left, {_NOT_SAVED}: its class is none of transformers'"
            )
        return None
    config: Any = model.config
    values = decode_floats(json.loads(config.to_json_string()))
    values.pop(RECORD, None)
    values["architectures"] = [stock_class(model).__name__]
    sizes = values.pop("dense_sizes", None)
    try:
        if not needs_prunekit(values):
            _compare(model, values)
            return None
    except _OtherShape:
        pass
    try:
        dense = build_dense(make_dense_config(values | {"dense_sizes": sizes}))
    except Exception as error:
        raise _refusal(error) from error
    return make_record(model, dense)


def let_others_save(model: nn.Module) -> None:
    """Let transformers' own functions save, copy and pickle a model of theirs that was cut.

    Its config gets the record that its folder must hold, and no longer refuses the model's sizes.
    Nothing is done where the class makes all sizes, and where the model can't be saved.
    """
    try:
        record = required_record(model) if hasattr(model, "config") else None
    except CheckpointError:
        return
    if record is not None:
        config: Any = model.config
        let_save_itself(model)  # type: ignore[arg-type]
        setattr(config, RECORD, record)


def check_loadable(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Check that a model built from the config would compute with the same numbers as this model.

    Attributes beside the weights are compared: sizes, scales, tables. Models whose class is not of
    transformers pass.

    Raises:
        CheckpointError: the built model would compute with other numbers, or can't be built.
    """
    if _is_stock(model):
        _compare(model, config)


def _is_stock(model: nn.Module) -> bool:
    return stock_class(model).__module__.startswith("transformers.")


def _refusal(error: Exception) -> CheckpointError:
    reason = first_line(error).removeprefix("damaged: ").rstrip(":.")
    return _OtherShape(f"its class refuses its sizes ({reason}): {_NOT_SAVED}")


def _compare(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the model that a config describes would differ from this one."""
    try:
        skeleton = build_pruned(make_dense_config(config), config)
    except CheckpointError as error:
        raise _refusal(error) from error
    saved = model.state_dict()
    _compare_modules(model, skeleton)
    if needs_prunekit(config):
        try:
            adopt(skeleton, {name: tensor.to("meta") for name, tensor in saved.items()})
        except CheckpointError as error:
            reason = str(error).removeprefix("damaged weights: ")
            raise CheckpointError(
                f"its config makes another model ({reason}): {_NOT_SAVED}"
            ) from error
    for name, tensor in skeleton.state_dict().items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise _OtherShape(f"{name}: its class would make it in another shape: {_NOT_SAVED}")
    for path, module in model.named_modules():
        number = _other_number(module, skeleton.get_submodule(path), path, saved)
        if number is not None:
            where = f"{path}.{number}".lstrip(".")
            raise CheckpointError(
                f"{where}: its class would make it with another number than it has: {_NOT_SAVED}"
            )


def _compare_modules(model: nn.Module, skeleton: nn.Module) -> None:
    built = {path for path, _ in skeleton.named_modules()}
    if missing := [path for path, _ in model.named_modules() if path not in built]:
        raise CheckpointError(
            f"{missing[0]}: its class would build another module there: {_NOT_SAVED}"
        )


def _other_number(
    module: nn.Module, other: nn.Module, path: str, saved: Mapping[str, Tensor]
) -> str | None:
    """The name of a number or table that differs between two modules of one class; None: none.

    Tables are buffers that no file holds, for the class computes them. Frequencies that follow the
    length of a text are those of the text before.
    """
    follows = follows_length(module)
    tables = {
        name: buffer
        for name, buffer in module._buffers.items()
        if f"{path}.{name}".lstrip(".") not in saved and buffer is not None
    }
    for name, value in [*vars(module).items(), *tables.items()]:
        if follows and name.endswith("inv_freq") and "original" not in name:
            continue
        anew = other._buffers.get(name, vars(other).get(name, value))
        if not name.startswith("_") and not _agree(value, anew):
            return name
    return None


def _agree(value: object, other: object) -> bool:
    """Whether numbers or tables agree; values of other types always do."""
    if isinstance(value, Tensor) and isinstance(other, Tensor) and not value.is_meta:
        # Where a model was cast to half precision, its tables are rounded too.
        other = other.to(value.device, value.dtype)
        return value.shape == other.shape and torch.allclose(value, other, equal_nan=True)
    return type(value) not in (int, float) or value == other
