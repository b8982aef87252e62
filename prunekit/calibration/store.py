"""Activations between two passes: on the device, in (pinned) host memory, or in files mapped when
read, by budget.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from prunekit.errors import DataError
from prunekit.runtime.memory import free_bytes


class Kept:
    """A tensor put aside; `get` brings it to the device, `free` lets it go."""

    def __init__(self, store: Store, tensor: Tensor, level: str, path: Path | None = None) -> None:
        self._store, self._level, self._path = store, level, path
        self._tensor: Tensor | None = tensor
        self.nbytes = tensor.nbytes

    def get(self, copy: bool = False) -> Tensor:
        """The tensor, on the store's device; with `copy` one that may be written to."""
        tensor = self._tensor
        assert tensor is not None
        if self._path is not None:
            mapped = torch.from_file(str(self._path), size=tensor.numel(), dtype=tensor.dtype)
            return mapped.view(tensor.shape).to(self._store.device, copy=True)
        return (
            tensor.clone()
            if copy and self._level == "device"
            else tensor.to(self._store.device, non_blocking=True)
        )

    def free(self) -> None:
        """Give its bytes back."""
        if self._tensor is not None:
            self._tensor = None
            self._store.used[self._level] -= self.nbytes
            if self._path is not None:
                self._path.unlink(missing_ok=True)


class Store:
    """Keeps tensors: the first `budget` bytes on `device`, then `host` bytes in pinned memory, the
    rest in files.

    On a CPU `host` counts for nothing: what `budget` doesn't hold goes to files.

    Args:
        device: where the tensors are used.
        budget: bytes kept there; half of what is free by default.
        host: bytes kept in host memory for another device; half of what is free by default.
        folder: for the files alone; what is there goes. A new temporary folder by default. Removed
            by `close`.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        budget: float | None = None,
        host: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        self.limits = {
            "device": free_bytes(self.device) / 2 if budget is None else budget,
            "host": 0.0
            if on_cpu
            else (free_bytes(torch.device("cpu")) / 2 if host is None else host),
        }
        self.used = {"device": 0, "host": 0, "file": 0}
        self.peak = dict(self.used)
        self._given, self._count = folder, 0
        self._folder: Path | None = None

    def put(self, tensor: Tensor, copy: bool = True) -> Kept:
        """Put a tensor aside; without a `copy` it must not change afterwards."""
        tensor = tensor.detach()
        level = next(
            (
                name
                for name, limit in self.limits.items()
                if self.used[name] + tensor.nbytes <= limit
            ),
            "file",
        )
        path = self._write(tensor) if level == "file" else None
        self.used[level] += tensor.nbytes
        self.peak[level] = max(self.peak[level], self.used[level])
        if level == "host":
            tensor = torch.empty_like(
                tensor, device="cpu", pin_memory=self.device.type == "cuda"
            ).copy_(tensor)
        elif level == "device" and copy:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        return Kept(
            self, tensor if path is None else torch.empty_like(tensor, device="meta"), level, path
        )

    def _write(self, tensor: Tensor) -> Path:
        folder = self._folder or self._given
        try:
            if self._folder is None:
                if self._given:
                    shutil.rmtree(self._given, ignore_errors=True)
                    self._given.mkdir(parents=True)
                folder = self._folder = self._given or Path(
                    tempfile.mkdtemp(prefix="prunekit-activations-")
                )
            self._count += 1
            path = self._folder / f"{self._count}.bin"
            tensor.to("cpu").contiguous().flatten().view(torch.uint8).numpy().tofile(path)
        except OSError as error:
            self.close()
            what = f"{tensor.nbytes:,} more bytes of activations"
            raise DataError(
                f"memory.folder: {folder} can't hold {what}: {error.strerror or error}"
            ) from error
        return path

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
