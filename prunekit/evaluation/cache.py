"""Keeps figures by the content of all that decides them: a sweep measures its dense model once."""

from __future__ import annotations

import inspect
import json
import os
import platform
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunekit.runtime.files import digest
from prunekit.runtime.processes import from_first

T = TypeVar("T")
_PACKAGES = ("torch", "transformers", "tokenizers", "lm_eval", "datasets")
_OWN = ("evaluation", "data", "model", "runtime")  # packages whose code decides figures
_THREADS = 8  # at most, that digest weights at the same time
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
        known: values that the process holds, of any types; it is filled here, and asked before the
            files are. None: only files are asked.
        shared: all processes remember the same values at the same time: the first one looks, and
            all compute what it doesn't find.
    """

    def __init__(
        self,
        folder: Path | None = None,
        model: str | None = None,
        known: MutableMapping[str, Any] | None = None,
        shared: bool = False,
    ) -> None:
        self.folder = folder if model else None
        self.model = model
        self.known = known if model else None
        self.shared = shared

    def get(self, key: str) -> object:
        """The value under the key; None where there is none, or its file is damaged."""
        if self.known is not None and (held := self.known.get(f"{self.model} {key}")) is not None:
            return held
        if self.folder is None:
            return None
        try:
            entry = json.loads(self._path(key).read_text(encoding="utf-8"))
            return entry["value"] if entry["check"] == self._check(key, entry["value"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, value: object) -> None:
        """Keep a value; a folder that can't be written is no error."""
        self._hold(key, value)
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
        kept = from_first(self.get(key)) if self.shared else self.get(key)
        if kept is not None:
            self._hold(key, kept)
            return kept  # type: ignore[return-value]  # of JSON's types, as it was put
        value = compute()
        self.put(key, value)
        return value

    def hold(self, name: str, how: object, compute: Callable[[], T]) -> T:
        """A value of any type, held by the process alone: one for each `name`, the last one.

        `how` has, in its text, all that decides the value beside the model.
        """
        key = f"{self.model} {how!r}"
        if self.known is None:
            return compute()
        if self.known.get(name, ("",))[0] != key:
            self.known[name] = (key, compute())
        value: T = self.known[name][1]
        return value

    def _hold(self, key: str, value: object) -> None:
        if self.known is not None:
            self.known[f"{self.model} {key}"] = value

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


def _content_of(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[str]:
    """Yield a digest of each tensor in turn; from a GPU, its bytes are a copy.

    Tensors are digested by several threads, for one takes 10 s and more for a 7B model.
    """
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(_digest_tensor, tensors)


def _digest_tensor(named: tuple[str, Tensor]) -> str:
    """A digest of the name, the form and the bytes of a tensor."""
    name, tensor = named
    flat = tensor.detach().cpu().contiguous().flatten()
    numbers = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return digest([f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}", numbers])


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
