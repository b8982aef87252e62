"""Before a model is saved: the sizes its config must state, and whether that config leads back to
the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import CheckpointError, first_line
from prunekit.model.build import adopt, built, dense_config, only_ours, unfitted
from prunekit.model.record import RECORD, record_of, stock_class

_NOT_SAVED = "a model cut like this can't be saved"


class _OtherShape(CheckpointError):
    """The class can't hold the weights: transformers' own loader sees that as well."""


def record(model: Any) -> dict[str, Any] | None:
    """What a folder must say of a model's sizes (`pruned_sizes`); None where transformers' own
    class makes them.

    Raises:
        CheckpointError: the class refuses the sizes; or it would take the weights and compute with
            other numbers, which nobody would notice who loads the folder without prunekit.
    """
    if not _is_stock(model):
        return None
    values = json.loads(model.config.to_json_string())
    values.pop(RECORD, None)
    sizes = values.pop("dense_sizes", None)
    try:
        if not only_ours(values):
            if sizes:
                _compare(model, values)
            return None
    except _OtherShape:
        pass
    try:
        dense = unfitted(dense_config(Path(), values | {"dense_sizes": sizes}))
    except Exception as error:
        raise _refusal(error) from error
    return record_of(model, dense)


def check_loadable(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise CheckpointError where a model built from a folder's config would compute with other
    numbers than this.

    Compares what modules keep beside their weights: sizes, scales, tables. Only for classes of
    transformers.
    """
    if _is_stock(model):
        _compare(model, config)


def _is_stock(model: Any) -> bool:
    return stock_class(model).__module__.startswith("transformers.")


def _refusal(error: Exception) -> CheckpointError:
    reason = first_line(error).removeprefix("config.json: damaged: ").rstrip(":.")
    return _OtherShape(f"its class refuses its sizes ({reason}): {_NOT_SAVED}")


def _compare(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise CheckpointError where the model that a config describes would differ from this one."""
    try:
        skeleton = built(Path(), dense_config(Path(), config), config, None)
    except CheckpointError as error:
        raise _refusal(error) from error
    saved = model.state_dict()
    found = {path for path, _ in skeleton.named_modules()}
    if missing := [path for path, _ in model.named_modules() if path not in found]:
        raise CheckpointError(
            f"{missing[0]}: its class would build another module there: {_NOT_SAVED}"
        )
    if only_ours(config):
        adopt(skeleton, {name: tensor.to("meta") for name, tensor in saved.items()}, Path())
    for name, tensor in skeleton.state_dict().items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise _OtherShape(f"{name}: its class would make it in another shape: {_NOT_SAVED}")
    for path, module in model.named_modules():
        other = skeleton.get_submodule(path)
        tables = {
            n: b
            for n, b in module._buffers.items()
            if f"{path}.{n}".lstrip(".") not in saved and b is not None
        }
        for name, value in [*vars(module).items(), *tables.items()]:
            anew = other._buffers.get(name, vars(other).get(name, value))
            if not name.startswith("_") and not _equal(value, anew):
                where = f"{path}.{name}".lstrip(".")
                raise CheckpointError(
                    f"{where}: its class would make it with another number than it has: {_NOT_SAVED}"
                )


def _equal(value: Any, other: Any) -> bool:
    """Whether numbers or tables agree; anything else does."""
    if isinstance(value, Tensor) and isinstance(other, Tensor) and not value.is_meta:
        other = other.to(
            value.device, value.dtype
        )  # a model turned into half precision rounds its tables too
        return value.shape == other.shape and torch.allclose(value, other, equal_nan=True)
    return type(value) not in (int, float) or value == other
