"""Keeps figures by the content of all that decides them: a sweep measures its dense model once."""

from __future__ import annotations

import inspect
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from prunekit.runtime.files import digest

T = TypeVar("T")
_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval", "datasets")
_OWN = ("evaluation", "data", "model", "runtime")  # packages whose code decides figures
# Entries of a config on where a model is from, which change nothing that it computes.
_ORIGIN = ("_name_or_path", "transformers_version")


def default_folder() -> Path:
    """Where figures are kept unless the configuration says otherwise."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "prunekit" / "evaluations"


class Cache:
    """Values of JSON's types, one file each, which is written whole or not at all.

    Args:
        folder: of the files; None: nothing is kept.
        model: what tells the content of the model from others' (`model_key`); None: nothing is
            kept.
    """

    def __init__(self, folder: Path | None = None, model: str | None = None) -> None:
        self.folder = folder if model else None
        self.model = model

    def get(self, key: str) -> object:
        """The value under the key; None where there is none, or its file is damaged."""
        if self.folder is None:
            return None
        try:
            entry = json.loads(self._path(key).read_text(encoding="utf-8"))
            return entry["value"] if entry["check"] == self._check(key, entry["value"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, value: object) -> None:
        """Keep a value; a folder that can't be written is no error."""
        if self.folder is None:
            return
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        entry = {"model": self.model, "key": key, "value": value, "check": self._check(key, value)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(entry), encoding="utf-8")
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()

    def remember(self, key: str, compute: Callable[[], T]) -> T:
        """The value under the key, computed and kept where there is none."""
        kept = self.get(key)
        if kept is not None:
            return kept  # type: ignore[return-value]  # of JSON's types, as it was put
        value = compute()
        self.put(key, value)
        return value

    def _check(self, key: str, value: object) -> str:
        return digest([str(self.model), key, json.dumps(value, sort_keys=True)])

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{digest([str(self.model), key, surroundings()])}.json"


def surroundings() -> str:
    """A digest of all that figures depend on, beside the model, the data and the protocol.

    These are versions, the processor, the number of threads, and prunekit's own code.
    """
    facts = [platform.python_version(), platform.machine(), str(torch.get_num_threads())]
    for name in _PACKAGES:
        try:
            facts.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            facts.append(name)
    if torch.cuda.is_available():
        facts.append(torch.cuda.get_device_name())
    return digest([*facts, *_own_code()])


def _own_code() -> list[bytes]:
    """The source files of the packages whose code decides figures, in a fixed order."""
    root = Path(__file__).parent.parent
    return [path.read_bytes() for name in _OWN for path in sorted((root / name).rglob("*.py"))]


def model_key(model: nn.Module) -> str | None:
    """A digest of a model's content; None where a weight is not in memory.

    The content is its weights and buffers byte for byte, its classes, its config, and the type of
    its device.
    """
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    if any(tensor.is_meta for _, tensor in tensors):
        return None
    return digest(chain(_code_of(model), _config_of(model), _content_of(tensors)))


def _content_of(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str | bytes | memoryview]:
    """Yield the name, form and bytes of each tensor in turn; from a GPU, the bytes are a copy."""
    for name, tensor in tensors:
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}"
        flat = tensor.detach().cpu().contiguous().flatten()
        yield flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _code_of(model: nn.Module) -> list[str | bytes]:
    """The names of the modules' classes, and the files that came with the checkpoint.

    No package's version stands for the content of these files.
    """
    classes = [type(module) for module in model.modules()]
    files = {
        inspect.getfile(one) for one in classes if one.__module__.startswith("transformers_modules")
    }
    names = [f"{one.__module__}.{one.__qualname__}" for one in classes]
    return [*names, *(Path(file).read_bytes() for file in sorted(files))]


def _config_of(model: nn.Module) -> list[str]:
    config = getattr(model, "config", None)
    if config is None:
        return []
    facts = {key: value for key, value in config.to_dict().items() if key not in _ORIGIN}
    attention = str(getattr(config, "_attn_implementation", None))
    return [json.dumps(facts, sort_keys=True, default=str), attention]
