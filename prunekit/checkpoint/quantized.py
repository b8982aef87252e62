"""Checkpoints of quantised weights: GGUF files, and folders whose weights stand for others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunekit.errors import CheckpointError, first_line
from prunekit.model.wrappers import find_quantization


def is_gguf(source: str | Path) -> bool:
    """Whether a model's place is a GGUF file."""
    return Path(source).suffix == ".gguf" and Path(source).is_file()


def locate(source: str | Path) -> dict[str, Any]:
    """A model's place as transformers' `from_pretrained` wants it."""
    path = Path(source)
    if is_gguf(source):
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": source}


def quantization_of(config: Mapping[str, Any]) -> str | None:
    """How the weights beside a `config.json` are quantised; None where they are plain numbers."""
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        return None
    return str(section.get("quant_method") or "by a method that config.json does not name")


def ask_to_dequantize(source: str | Path, method: str) -> str:
    """The message that weights are quantised."""
    return (
        f"{source}: its weights are quantised ({method}), expected floating-point weights: "
        "model.dequantize=true (in Python dequantize=True) makes such weights of them"
    )


def dequantizing(source: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' `from_pretrained` is given to dequantise while it loads, if it can."""
    from transformers import AutoConfig, GgufConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if is_gguf(source):
        return {"quantization_config": GgufConfig(dequantize=True)}
    trust = options["trust_remote_code"]
    config: Any = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    section = getattr(config, "quantization_config", None)
    if not isinstance(section, dict):
        return {}
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(str(section.get("quant_method")))
    if known is None or "dequantize" not in inspect.signature(known).parameters:
        return {}
    config.quantization_config = {**section, "dequantize": True}
    return {"config": config}


def make_plain(model: Any, source: str | Path, dequantize: bool) -> Any:
    """The loaded model with floating-point weights.

    Raises:
        CheckpointError: its weights are quantised, and this was not asked for or transformers
            can't.
    """
    if (method := find_quantization(model)) is None:
        return model
    if not dequantize:
        raise CheckpointError(ask_to_dequantize(source, method))
    try:
        model = model.dequantize()
    except Exception as error:
        raise CheckpointError(
            f"{source}: transformers can't dequantise {method} ({first_line(error)}): expected "
            "the checkpoint that it was made from"
        ) from error
    if (left := find_quantization(model)) is not None:
        raise CheckpointError(
            f"{source}: transformers left weights quantised ({left}): expected the checkpoint "
            "that it was made from"
        )
    return model
