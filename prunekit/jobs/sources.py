"""The sources of a job's models: memory, a folder, the hub; and digests to tell them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.checkpoint import from_pretrained
from prunekit.checkpoint.files import read_config
from prunekit.checkpoint.quantized import is_gguf
from prunekit.config import RunConfig
from prunekit.config.sections import ModelConfig
from prunekit.demo import DEMO_MODEL
from prunekit.errors import ConfigError
from prunekit.model.build import needs_prunekit
from prunekit.model.classes import auto_class_of
from prunekit.model.weights import cast_weights, weights_digest
from prunekit.runtime.devices import compute_dtype
from prunekit.runtime.files import checksum, digest

_PROCESSORS = ("processor", "preprocessor")
Source = str | Path | PreTrainedModel


def check_source(source: object, name: str) -> None:
    """Raise ConfigError where a source is neither a path, nor a hub name, nor a model."""
    if not isinstance(source, str | Path | PreTrainedModel) or source == "":
        raise ConfigError(
            f"{name}: expected a model of transformers, its folder or its name on the hub, "
            f"got {repr(source) if source == '' else type(source).__name__}"
        )


def check_folder(folder: object, name: str, advice: str = "") -> None:
    """Raise ConfigError where an argument is no path of a folder; `advice` ends the message."""
    if not isinstance(folder, str | Path) or folder == "":
        came = repr(folder) if isinstance(folder, str) else type(folder).__name__
        raise ConfigError(f"{name}: expected the path of a folder, got {came}{advice}")


def source_of(config: RunConfig) -> str | Path:
    """The folder or the name of the model that `model.path` means: the embedded one where empty."""
    return inside_run(config.model.path or DEMO_MODEL)


def inside_run(source: str | Path) -> str | Path:
    """A folder or a name as it is; the folder of a run means the model that the run left in it."""
    return Path(source) / "model" if (Path(source) / "model" / "config.json").is_file() else source


def base_of(config: RunConfig) -> str | None:
    """The name of the dense model on the hub; None where the model did not come from there."""
    return config.model.path if config.model.path and not Path(config.model.path).exists() else None


def load_source(
    source: Source, device: torch.device, stored: torch.dtype | None, how: ModelConfig
) -> tuple[PreTrainedModel, torch.dtype]:
    """Load a model to the device; a model in memory stays where it is.

    Half precision computes in float32 on a CPU; a caller puts the weights of a model in memory back
    by `keep_types`.

    Returns:
        The model in the type that it computes in, and the type that its result is stored in:
        `stored`, or else the type of the checkpoint.
    """
    if isinstance(source, nn.Module):
        stored = source.dtype
        if (dtype := compute_dtype(stored, device)) != stored:
            cast_weights(source, dtype)
        return source, stored
    model, stored = read_source(source, device, stored, how)
    return model.to(device), stored


def load_as_configured(source: str | Path, how: ModelConfig) -> PreTrainedModel:
    """Load a model from its folder, its GGUF file or the hub, as the section `model` says."""
    return from_pretrained(
        source, trust_remote_code=how.trust_remote_code, dequantize=how.dequantize
    )


def read_source(
    source: str | Path, device: torch.device, stored: torch.dtype | None, how: ModelConfig
) -> tuple[Any, torch.dtype]:
    """As `load_source`, for a folder or a name; the model is in the host's memory.

    `PreTrainedModel.to` is wrapped in a way that hides its signature: hence no type of the model's.
    """
    model = load_as_configured(source, how)
    stored = stored or next(model.parameters()).dtype
    cast_weights(model, compute_dtype(stored, device))
    return model, stored


def identity_of(source: Source) -> str:
    """A text that tells a model from others cheaply: its weight files with their sizes and times.

    For a model on the hub it is the name; for a model in memory, a digest of the weights.
    """
    if isinstance(source, nn.Module):
        return f"{type(source).__name__} {weights_digest(source)}"
    files = [Path(source)] if is_gguf(source) else sorted(Path(source).glob("*.safetensors"))
    times = (f"{f.name} {f.stat().st_size} {int(f.stat().st_mtime)}" for f in files)
    return f"{source} " + ", ".join(times)


def content_of(source: Source) -> str:
    """A digest of a model's folder, byte for byte."""
    if isinstance(source, nn.Module):
        return weights_digest(source)
    folder = Path(source)
    if is_gguf(source):
        return checksum(folder)
    files = sorted(
        file for end in ("safetensors", "json", "py") for file in folder.glob(f"*.{end}")
    )
    return digest(part for file in files for part in (file.name, checksum(file)))


def loading_of(folder: Path) -> tuple[Literal["stock", "remote", "prunekit"], str, str]:
    """What loads a folder, for its card.

    Returns:
        Stock transformers, transformers with remote code, or prunekit; the name of the auto class
        that the model is loaded with; and of the one for what prepares its inputs.
    """
    config = read_config(folder)
    way: Literal["stock", "remote", "prunekit"] = "stock"
    if config.get("auto_map") or needs_prunekit(config):
        way = "remote" if config.get("auto_map") else "prunekit"
    processor = any((folder / f"{name}_config.json").exists() for name in _PROCESSORS)
    return way, auto_class_of(config), "AutoProcessor" if processor else "AutoTokenizer"
