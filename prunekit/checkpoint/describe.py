"""What a pruned model's folder says beside transformers' own: sizes that its class would not make,
code to load it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from prunekit.model import modeling_prunekit
from prunekit.model.record import CODE, RECORD, names_our_code, stock_class


def describe(
    folder: Path, model: Any, record: dict[str, Any] | None, remote_code: bool = False
) -> None:
    """Complete `config.json`, and put the modelling file beside it where code is asked for.

    Args:
        folder: with the `config.json` that transformers wrote.
        model: what it is of.
        record: `required_record` of it; None for a model that transformers' class can build.
        remote_code: let transformers load the folder where prunekit is not installed;
            `trust_remote_code` is needed there. A model that needs no code gets none.
    """
    path, stock = folder / "config.json", stock_class(model)
    config = json.loads(path.read_text(encoding="utf-8"))
    codes = {
        key: name for key, name in config.pop("auto_map", {}).items() if not names_our_code(name)
    }
    config = {key: value for key, value in config.items() if key != RECORD} | (
        {"auto_map": codes} if codes else {}
    )
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
        config["architectures"] = [
            classes[-1].__name__
        ]  # no program must take it for the stock one
        names = ", ".join(found.__name__ for found in classes)
        shutil.copyfile(modeling_prunekit.__file__, folder / CODE)
        with (folder / CODE).open("a", encoding="utf-8") as code:
            code.write(f'\n\n{names} = pruned_classes("{config["model_type"]}", __name__)\n')
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
