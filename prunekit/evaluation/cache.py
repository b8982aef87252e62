"""Results of evaluations by the content of what made them, so that a sweep measures its dense model
once.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.runtime.files import digest

_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval", "datasets")


def default_folder() -> Path:
    """Where results are kept unless the configuration says otherwise."""
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        / "prunekit"
        / "evaluations"
    )


class Cache:
    """JSON values under a key of everything that decides them; one file each, written whole or not
    at all.

    Args:
        folder: of the files; None: nothing is kept.
        model: the content of the model (`model_key`); None: of one whose results are not kept.
    """

    def __init__(self, folder: Path | None = None, model: str | None = None) -> None:
        self.folder = folder if model else None
        self.model = model

    def get(self, key: str) -> Any:
        """What was kept under the key; None where nothing was, or it is damaged."""
        if self.folder is None:
            return None
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
            return found["value"] if found["check"] == self._check(key, found["value"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _check(self, key: str, value: Any) -> str:
        return digest([str(self.model), key, json.dumps(value, sort_keys=True)])

    def put(self, key: str, value: Any) -> None:
        """Keep a value of JSON's types; a folder that can't be written is no error."""
        if self.folder is None:
            return
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {
                "model": self.model,
                "key": key,
                "value": value,
                "check": self._check(key, value),
            }
            temporary.write_text(json.dumps(kept), encoding="utf-8")
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value under the key, computed where there is none."""
        if (found := self.get(key)) is None:
            found = compute()
            self.put(key, found)
        return found

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{digest([str(self.model), key, surroundings()])}.json"


def surroundings() -> str:
    """What beside model, data and protocol a result depends on: versions, the processor, this
    package's own code.
    """
    found = [platform.python_version(), platform.machine(), str(torch.get_num_threads())]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(name)
    found += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    own = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    return digest([*found, *own])


def model_key(model: nn.Module) -> str | None:
    """The content of a model: its weights and buffers byte for byte, its classes, its config, its
    device's type.

    None where a weight is not in memory.
    """
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    if any(tensor.is_meta for _, tensor in tensors):
        return None
    parts: list[str | bytes | memoryview] = [
        f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()
    ]
    parts += [
        Path(file).read_bytes()
        for file in sorted({file for m in model.modules() for file in _own_code(type(m))})
    ]
    config: Any = getattr(model, "config", None)
    if config is not None:
        facts = {
            k: v
            for k, v in config.to_dict().items()
            if k not in ("_name_or_path", "transformers_version")
        }
        parts += [
            json.dumps(facts, sort_keys=True, default=str),
            str(getattr(config, "_attn_implementation", None)),
        ]
    for name, tensor in tensors:
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}")
        flat = tensor.detach().cpu().contiguous().flatten()
        parts.append(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest(parts)


def _own_code(of: type) -> list[str]:
    """The file of a class that came with the checkpoint: no package's version stands for it."""
    return [inspect.getfile(of)] if of.__module__.startswith("transformers_modules") else []
