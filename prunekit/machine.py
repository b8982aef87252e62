"""The machine a run is on: devices and number types by name, seconds and peak memory of its stages."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from prunekit.errors import ConfigError

_MMAP_THRESHOLD = -3  # mallopt's number of it


@dataclass
class Stages:
    """Seconds and peak memory of every stage."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time one stage."""
        reset_peak(self.device)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)
        self.peak_memory_bytes[name] = max(peak_memory(self.device), self.peak_memory_bytes.get(name, 0))


def pick_device(name: str) -> torch.device:
    """The device a name stands for; `auto` takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # one GPU for each process of torchrun
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} can't be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """The type a name stands for; None for `auto`."""
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"dtype: unknown {name!r}; available: {', '.join(known)}")
    return known[name]


def return_freed() -> None:
    """Let freed tensors go back to the system at once, where glibc would keep them in its heap."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass  # another C library


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what an error says, on any device."""
    from accelerate.utils.memory import should_reduce_batch_size

    known = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    return known or (isinstance(error, Exception) and should_reduce_batch_size(error))


def reset_peak(device: torch.device) -> None:
    """Start measuring peak memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass


def peak_memory(device: torch.device) -> int:
    """Peak bytes since `reset_peak`: allocated on a GPU, resident elsewhere (ever, where the system can't reset)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
