"""The record of a pruned model: the sizes that its class would not build by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.model import modeling_prunekit
from prunekit.model.modeling_prunekit import body_path, empty_sublayers, place_in_stack

CODE = "modeling_prunekit.py"  # the file with which transformers loads a folder by itself
RECORD = "pruned_sizes"  # the entry of `config.json` that holds the record


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a folder's config holds the record that `modeling_prunekit` builds from."""
    return isinstance(config.get(RECORD), dict)


def names_our_code(reference: object) -> bool:
    """Whether an entry of `auto_map` names the modelling file that is saved beside models."""
    return isinstance(reference, str) and reference.split("--")[-1].startswith(
        f"{Path(CODE).stem}."
    )


def has_our_code(config: Mapping[str, Any]) -> bool:
    """Whether the code of a folder is the modelling file that is saved beside models."""
    codes = config.get("auto_map")
    return isinstance(codes, Mapping) and any(map(names_our_code, codes.values()))


def stock_class(model: nn.Module) -> type[nn.Module]:
    """The stock class of a model, also where its own class is one of `modeling_prunekit`."""
    return getattr(type(model), "stock_class", None) or type(model)


def make_record(model: Any, dense: nn.Module) -> dict[str, Any]:
    """Make the record of a model: the sizes in which it differs from the dense model of its class.

    Args:
        model: pruned; its weights may be on meta.
        dense: of its class, built `as_dense`; its weights may be on meta.
    """
    shapes: dict[str, list[int]] = {}
    attributes: dict[str, Any] = {}
    dense_modules = dict(dense.named_modules())
    for path, module in model.named_modules():
        other = dense_modules.get(path)
        for name, shape in _other_shapes(module, other).items():
            shapes[f"{path}.{name}".lstrip(".")] = shape
        for name, value in _other_numbers(module, other).items():
            attributes[f"{path}.{name}".lstrip(".")] = value
    known: dict[str, Any] = {
        "format": modeling_prunekit.FORMAT,
        "dense": modeling_prunekit.checksum(dense),
    }
    if (body := body_path(model)) != model.base_model_prefix:
        known["body"] = body
    record = {**known, "shapes": _pack(model, shapes), "attributes": _pack(model, attributes)}
    return record | _record_empty(model)


def record_numbers(module: nn.Module) -> dict[str, Any]:
    """Make the record of a module with every number that its modules keep, and with no shapes.

    It is for modules of which no dense one can be built to compare with.
    """
    numbers = {
        f"{path}.{name}".lstrip("."): value
        for path, inner in module.named_modules()
        for name, value in vars(inner).items()
        if not name.startswith("_") and _is_size(value)
    }
    known = {"format": modeling_prunekit.FORMAT, "shapes": {}}
    return {**known, "attributes": _pack(module, numbers), **_record_empty(module)}


def _record_empty(model: nn.Module) -> dict[str, Any]:
    empty = {f"{path}.empty": list(how) for path, how in empty_sublayers(model).items()}
    return {"empty": _pack(model, empty)} if empty else {}


def _other_shapes(module: nn.Module, dense: nn.Module | None) -> dict[str, list[int]]:
    """Shapes of the module's own tensors that the dense module lacks, or has in another shape."""
    shapes = {}
    for name, tensor in {**module._parameters, **module._buffers}.items():
        before = None if dense is None else dense._parameters.get(name, dense._buffers.get(name))
        if tensor is not None and (before is None or before.shape != tensor.shape):
            shapes[name] = list(tensor.shape)
    return shapes


def _other_numbers(module: nn.Module, dense: nn.Module | None) -> dict[str, Any]:
    """Attributes of the module that are numbers other than those of the dense module."""
    if dense is None:
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_size(value) and value != vars(dense).get(name, value)
    }


def _is_size(value: object) -> bool:
    if isinstance(value, tuple):
        return all(type(entry) is int for entry in value)
    return type(value) in (int, float)


def _pack(model: nn.Module, entries: Mapping[str, Any]) -> dict[str, str]:
    """Pack the entries of all layers into one: "model.layers.{}.mlp.n" → a JSON list over layers.

    A layer without the entry has null in the list.
    """
    packed: dict[str, Any] = {}
    for path, value in entries.items():
        if (place := place_in_stack(model, path)) is not None:
            stack, index = place
            rest = path.removeprefix(f"{stack}.{index}.")
            column = packed.setdefault(f"{stack}.{{}}.{rest}", [])
            column += [None] * (index + 1 - len(column))
            column[index] = value
        else:
            packed[path] = value
    return {path: json.dumps(value) for path, value in packed.items()}
