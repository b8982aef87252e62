"""What a pruned model's folder says beside transformers' own: sizes that its class would not make, code to load it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.exports import modeling_prunekit

CODE = "modeling_prunekit.py"
RECORD = "pruned_sizes"
_LAYER = re.compile(r"\.(\d+)\.")


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a folder's config holds the record that `modeling_prunekit` builds from."""
    return isinstance(config.get(RECORD), dict)


def stock_class(model: Any) -> Any:
    """The stock class, transformers' own, of a model that may have been loaded by one of `modeling_prunekit`."""
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
            before = None if other is None else other._parameters.get(name, other._buffers.get(name))
            if tensor is not None and (before is None or before.shape != tensor.shape):
                shapes[f"{path}.{name}".lstrip(".")] = list(tensor.shape)
        for name, value in vars(module).items() if other is not None else ():
            if not name.startswith("_") and _is_size(value) and value != vars(other).get(name, value):
                attributes[f"{path}.{name}".lstrip(".")] = value
    known = {"format": modeling_prunekit.FORMAT, "dense": modeling_prunekit.checksum(dense)}
    return {**known, "shapes": _packed(shapes), "attributes": _packed(attributes)}


def _is_size(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(type(entry) is int for entry in value)
    return type(value) in (int, float)


def _packed(entries: dict[str, Any]) -> dict[str, str]:
    """One line for all layers: "model.layers.{}.mlp.n" → a JSON list, null for a layer that there is no entry of."""
    packed: dict[str, Any] = {}
    for path, value in entries.items():
        if match := _LAYER.search(path):
            column = packed.setdefault(_LAYER.sub(".{}.", path, count=1), [])
            column += [None] * (int(match[1]) + 1 - len(column))
            column[int(match[1])] = value
        else:
            packed[path] = value
    return {path: json.dumps(value) for path, value in packed.items()}


def describe(folder: Path, model: Any, record: dict[str, Any] | None, remote_code: bool = False) -> None:
    """Complete `config.json`, and put the modelling file beside it where code is asked for.

    Args:
        folder: with the `config.json` that transformers wrote.
        model: what it is of.
        record: `record_of` it; None for a model that transformers' class can build.
        remote_code: let transformers load the folder where prunekit is not installed; `trust_remote_code` is needed
            there. A model that needs no code gets none.
    """
    path, stock = folder / "config.json", stock_class(model)
    config = json.loads(path.read_text(encoding="utf-8"))
    codes = {key: name for key, name in config.pop("auto_map", {}).items() if not is_our_code(name)}
    config = {key: value for key, value in config.items() if key != RECORD} | ({"auto_map": codes} if codes else {})
    config["architectures"] = [stock.__name__]
    (folder / CODE).unlink(missing_ok=True)
    if record is None:
        config.pop("dense_sizes", None)
    else:
        config[RECORD] = record
    if record is not None and remote_code:
        classes = modeling_prunekit.pruned_classes(config["model_type"], __name__)
        entries = zip(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), classes, strict=True)
        config["auto_map"] = {key: f"{Path(CODE).stem}.{found.__name__}" for key, found in entries}
        config["architectures"] = [classes[-1].__name__]  # no program must take it for the stock one
        names = ", ".join(found.__name__ for found in classes)
        shutil.copyfile(modeling_prunekit.__file__, folder / CODE)
        with (folder / CODE).open("a", encoding="utf-8") as code:
            code.write(f'\n\n{names} = pruned_classes("{config["model_type"]}", __name__)\n')
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_our_code(reference: Any) -> bool:
    """Whether an entry of `auto_map` names the file that `describe` writes."""
    return isinstance(reference, str) and reference.split("--")[-1].startswith(f"{Path(CODE).stem}.")
