"""What the runs of a sweep have in common: texts and the dense model, read and measured once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from prunekit.config.sections import ModelConfig
from prunekit.evaluation.cache import model_key
from prunekit.jobs.sources import read_source
from prunekit.runtime.memory import free_bytes
from prunekit.runtime.processes import world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

_SHARE = 0.25  # of the host's free memory that the kept model may take
_HOST = torch.device("cpu")


class Kept:
    """The dense model of a sweep as it was loaded, and what was measured on it.

    A run gets a copy: whatever it does, or fails to do, the next run begins with the same weights.
    The model waits in the host's memory, where a quarter of what is free suffices for it; where
    not, every run loads it, and only its figures are kept.

    Attributes:
        figures: what was measured (`Measures.of`).
    """

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self._windows: dict[Hashable, Any] = {}
        self._loaded: _Loaded | None = None
        self._content: str | None = None

    def forget(self) -> None:
        """Let go of the model, its figures and its token windows."""
        self.figures.clear()
        self._windows.clear()
        self._loaded = self._content = None

    def load(
        self,
        source: str | Path,
        device: torch.device,
        stored: torch.dtype | None,
        how: ModelConfig,
    ) -> tuple[PreTrainedModel, torch.dtype]:
        """Load a model as `load_source` does, from its folder only if that changed since.

        Another folder, device or type takes the place of the one before.
        """
        key = (_stamp(source), device, how.trust_remote_code, how.dequantize)
        loaded = self._loaded
        if loaded is None or loaded.key != key or stored not in (loaded.asked, loaded.stored):
            loaded = None
            self.forget()  # before the next one is loaded
        if loaded is None or loaded.model is None:
            model, result = read_source(source, device, stored, how)
            fits = world_size() == 1 and _bytes_of(model) <= _SHARE * free_bytes(_HOST)
            self._loaded = _Loaded(
                key=key, asked=stored, stored=result, model=model if fits else None
            )
            return (copy.deepcopy(model) if fits else model).to(device), result
        return copy.deepcopy(loaded.model).to(device), loaded.stored

    def windows(self, how: Hashable, load: Callable[[], T]) -> T:
        """Token windows of the model's tokenizer; `how` has all else that decides them."""
        if how not in self._windows:
            self._windows[how] = load()
        return self._windows[how]

    def digest(self, model: PreTrainedModel) -> str | None:
        """The `model_key` of a model that `load` returned, found once."""
        self._content = self._content or model_key(model)
        return self._content


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """What was loaded last, by what it was asked for; no `model` where memory is short."""

    key: Hashable
    asked: torch.dtype | None
    stored: torch.dtype
    model: Any  # a PreTrainedModel, or None


def _stamp(source: str | Path) -> tuple[Hashable, ...]:
    """What changes with any file of a folder: names, sizes, times; of a name on the hub, itself."""
    folder = Path(source)
    files = sorted(path for path in [folder, *folder.rglob("*")] if path.is_file())
    stats = ((str(path), path.stat()) for path in files)
    return str(source), *(
        (name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats
    )


def _bytes_of(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
