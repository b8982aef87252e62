"""Completes a saved folder: sizes that the model's class would not make, and code to load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.model import modeling_prunekit
from prunekit.model.classes import auto_classes_of
from prunekit.model.record import CODE, RECORD, names_our_code, stock_class


def describe(
    folder: Path, model: nn.Module, record: dict[str, Any] | None, remote_code: bool = False
) -> None:
    """Complete `config.json`, and put the modelling file beside it where code is asked for.

    Args:
        folder: holds the `config.json` that transformers wrote.
        model: the model that is saved there.
        record: what `required_record` says of it; None where transformers' class can build it.
        remote_code: let transformers load the folder where prunekit is not installed;
            `trust_remote_code` is needed there. A model that needs no code gets none.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop(RECORD, None)
    _forget_our_code(folder, config)
    config["architectures"] = [stock_class(model).__name__]
    if record is None:
        config.pop("dense_sizes", None)
    else:
        config[RECORD] = record
    if record is not None and remote_code:
        _add_code(folder, config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _forget_our_code(folder: Path, config: dict[str, Any]) -> None:
    """Remove the modelling file and its entries in the config: a loaded model may bring both."""
    (folder / CODE).unlink(missing_ok=True)
    codes = config.pop("auto_map", {})
    if others := {key: name for key, name in codes.items() if not names_our_code(name)}:
        config["auto_map"] = others


def _add_code(folder: Path, config: dict[str, Any]) -> None:
    """Put the modelling file into the folder, and let the config name its classes."""
    model_type, architecture = config["model_type"], config["architectures"][0]
    autos = auto_classes_of(model_type, architecture)
    stock = list(dict.fromkeys([*autos.values(), architecture]))
    classes = modeling_prunekit.pruned_classes(model_type, __name__, *stock)
    names = [one.__name__ for one in classes]
    chosen = {"AutoConfig": names[0]} | {auto: f"Pruned{name}" for auto, name in autos.items()}
    config["auto_map"] = {auto: f"{Path(CODE).stem}.{name}" for auto, name in chosen.items()}
    # Not the name of the stock class: no program must take the model for a stock one.
    config["architectures"] = [f"Pruned{architecture}"]
    shutil.copyfile(modeling_prunekit.__file__, folder / CODE)
    given = ", ".join(f'"{name}"' for name in (model_type, *stock))
    given = given.replace(",", ", __name__,", 1)
    with (folder / CODE).open("a", encoding="utf-8") as code:
        code.write(f"\n\n{', '.join(names)} = pruned_classes({given})\n")
