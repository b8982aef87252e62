"""The record of a pruned model: the sizes that its config must state because its class would build
others.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.model import modeling_prunekit

CODE = "modeling_prunekit.py"


RECORD = "pruned_sizes"


_LAYER = re.compile(r"\.(\d+)\.")


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a folder's config holds the record that `modeling_prunekit` builds from."""
    return isinstance(config.get(RECORD), dict)


def stock_class(model: Any) -> Any:
    """The stock class, transformers' own, of a model that may have been loaded by one of
    `modeling_prunekit`.
    """
    return getattr(type(model), "stock_class", None) or type(model)


def record_of(model: nn.Module, dense: nn.Module) -> dict[str, Any]:
    """`pruned_sizes` of a model: what differs from the one its class builds.

    Args:
        model: pruned; its weights may be on meta.
        dense: of its class, built `as_dense`; may be on meta.
    """
    shapes: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    built = dict(dense.named_modules())
    for path, module in model.named_modules():
        other = built.get(path)
        for name, tensor in {**module._parameters, **module._buffers}.items():
            before = (
                None if other is None else other._parameters.get(name, other._buffers.get(name))
            )
            if tensor is not None and (before is None or before.shape != tensor.shape):
                shapes[f"{path}.{name}".lstrip(".")] = list(tensor.shape)
        for name, value in vars(module).items() if other is not None else ():
            if (
                not name.startswith("_")
                and _is_size(value)
                and value != vars(other).get(name, value)
            ):
                attributes[f"{path}.{name}".lstrip(".")] = value
    known = {"format": modeling_prunekit.FORMAT, "dense": modeling_prunekit.checksum(dense)}
    return {**known, "shapes": _packed(shapes), "attributes": _packed(attributes)}


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(type(entry) is int for entry in value)
    return type(value) in (int, float)


def _packed(entries: dict[str, Any]) -> dict[str, str]:
    """One line for all layers: "model.layers.{}.mlp.n" → a JSON list, null for a layer that there
    is no entry of.
    """
    packed: dict[str, Any] = {}
    for path, value in entries.items():
        if match := _LAYER.search(path):
            column = packed.setdefault(_LAYER.sub(".{}.", path, count=1), [])
            column += [None] * (int(match[1]) + 1 - len(column))
            column[int(match[1])] = value
        else:
            packed[path] = value
    return {path: json.dumps(value) for path, value in packed.items()}


def is_our_code(reference: Any) -> bool:
    """Whether an entry of `auto_map` names the file that `describe` writes."""
    return isinstance(reference, str) and reference.split("--")[-1].startswith(
        f"{Path(CODE).stem}."
    )
