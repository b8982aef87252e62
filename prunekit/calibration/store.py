"""Activations between two passes: on the device, in host memory, or in files, by budget.

Copies to the host's memory and back run beside a GPU's work; files are mapped when read.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from prunekit.errors import DataError
from prunekit.runtime.copies import Copies, Event
from prunekit.runtime.memory import free_bytes


class Kept:
    """A tensor that a store keeps: `get` brings it to the device, `free` lets it go.

    One that nobody holds any more is freed too.
    """

    def __init__(
        self,
        store: Store,
        tensor: Tensor,
        level: str,
        path: Path | None = None,
        written: Event | None = None,
    ) -> None:
        self._store, self._level, self._path, self._written = store, level, path, written
        self._tensor: Tensor | None = tensor
        self._coming: tuple[Tensor, Event] | None = None  # on its way to the device
        self.nbytes = tensor.nbytes

    def fetch(self) -> None:
        """Begin to bring the tensor from the host to a GPU, for a `get` that comes soon."""
        if self._written is not None and self._tensor is not None and self._coming is None:
            assert self._store.copies is not None
            self._coming = self._store.copies.bring(self._tensor, self._written)

    def get(self, copy: bool = False) -> Tensor:
        """The tensor on the store's device; with `copy` one that the caller may write to."""
        tensor = self._tensor
        assert tensor is not None
        self.fetch()
        if (arrived := self._arrive()) is not None:
            return arrived
        if self._path is not None:
            mapped = torch.from_file(str(self._path), size=tensor.numel(), dtype=tensor.dtype)
            return mapped.view(tensor.shape).to(self._store.device, copy=True)
        tensor = tensor.to(self._store.device, non_blocking=True)  # a layer may lie elsewhere
        return tensor.clone() if copy else tensor

    def _arrive(self) -> Tensor | None:
        """What `fetch` began to bring, if anything; the GPU's next work begins when it is there."""
        if self._coming is None:
            return None
        (tensor, there), self._coming = self._coming, None
        assert self._store.copies is not None
        self._store.copies.await_copy(there)
        return tensor

    def free(self) -> None:
        """Give the bytes of the tensor back to the store; `get` must not be called any more."""
        self._arrive()
        if self._tensor is not None:
            self._tensor = None
            self._store.used[self._level] -= self.nbytes
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    def __del__(self) -> None:
        """Give the bytes back where nobody did."""
        self.free()


class Store:
    """Keeps tensors: the first bytes on the device, the next in host memory, the rest in files.

    Where host memory is that of the device, as on a CPU, there is no second step.

    Args:
        device: the device that the tensors are used on.
        budget: bytes kept on the device; half of its free memory by default.
        host: bytes kept in host memory for another device; half of the free memory by default.
        folder: the place of the files alone: whatever lies there is removed. A new temporary
            folder by default. `close` removes it.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        budget: float | None = None,
        host: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.copies = Copies(self.device) if self.device.type == "cuda" else None
        self.limits = {
            "device": free_bytes(self.device) / 2 if budget is None else budget,
            "host": 0.0
            if self.copies is None
            else (free_bytes(torch.device("cpu")) / 2 if host is None else host),
        }
        self.used = {"device": 0, "host": 0, "file": 0}
        self.peak = dict(self.used)
        self._given, self._count = folder, 0
        self._folder: Path | None = None

    def put(self, tensor: Tensor, copy: bool = True) -> Kept:
        """Put a tensor aside; without a `copy` the caller must not change it afterwards.

        Raises:
            DataError: the folder can't hold it.
        """
        tensor = tensor.detach()
        level = self._find_room(tensor.nbytes)
        path = self._write(tensor) if level == "file" else None
        self.used[level] += tensor.nbytes
        self.peak[level] = max(self.peak[level], self.used[level])
        written = None
        if level == "file":
            tensor = torch.empty_like(tensor, device="meta")  # shape and dtype, to read it back
        elif copy:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        if level == "host" and self.copies is not None:
            tensor, written = self.copies.take(tensor.to(self.device))
        return Kept(self, tensor, level, path, written)

    def is_near(self, nbytes: int) -> bool:
        """Whether so many more bytes stay where they need not be brought back from to a GPU."""
        return self.copies is None or self._find_room(nbytes) == "device"

    def _find_room(self, nbytes: int) -> str:
        """The first of device, host and file that has room for so many more bytes."""
        for level, limit in self.limits.items():
            if self.used[level] + nbytes <= limit:
                return level
        return "file"

    def _write(self, tensor: Tensor) -> Path:
        """Write the bytes of a tensor to a file of its own; the first one makes the folder."""
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
        """Remove the folder with the files, and let go of what is on its way to the host."""
        if self.copies is not None:
            self.copies.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
