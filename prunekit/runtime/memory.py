"""Memory of the machine: free bytes, the peak of a stage, smaller batches when it runs out."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_MMAP_THRESHOLD = -3  # the number that mallopt gives to M_MMAP_THRESHOLD


def return_freed() -> None:
    """Let freed tensors go back to the system at once, where glibc would keep them in its heap."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass  # another C library, which has no such setting


def to_host(
    tensor: Tensor, dtype: torch.dtype | None = None, *, copy: bool = False, wait: bool = True
) -> Tensor:
    """A tensor in host memory, contiguous and pinned if it comes from a GPU; itself if it can be.

    Pinned memory is what a GPU copies from and to without a detour.

    Args:
        tensor: on any device.
        dtype: the type of the result; the tensor's by default.
        copy: never the tensor itself.
        wait: for a GPU to have written the numbers. Without, only this GPU may read them: it copies
            in the order of its work.
    """
    dtype = dtype or tensor.dtype
    if tensor.device.type != "cuda":
        return tensor.to("cpu", dtype, copy=copy).contiguous()
    pinned = torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=not wait)


def run_within_memory(
    attempt: Callable[[int], T],
    size: int,
    shrink: Callable[[int, Exception], int],
    announce: Callable[[int, int], None],
) -> T:
    """Run `attempt(size)`, with smaller and smaller sizes while memory is too small; its result.

    Args:
        attempt: does the work in batches of a size.
        size: the size to begin with.
        shrink: takes the size that memory was too small for, and the error; returns a smaller size
            to go on with, or raises an error that tells the user what to do.
        announce: takes the size that failed and the next one, before the next attempt; the tensors
            of the attempt that failed are freed by then.

    Raises:
        Exception: any error of `attempt` that does not say that memory ran out, as it is.
    """
    while True:
        try:
            return attempt(size)
        except Exception as error:
            if not out_of_memory(error):
                raise
            smaller = shrink(size, error)
        free_cached()  # outside of `except`: the error no longer holds tensors
        announce(size, smaller)
        size = smaller


def free_cached() -> None:
    """Collect garbage, and return the memory that torch's allocator caches to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    from accelerate.utils.memory import should_reduce_batch_size

    known = isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)
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
    """Peak bytes since `reset_peak`: allocated on a GPU, resident in the host's memory elsewhere.

    Where the system can't reset its count, the peak is that since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return next(
            int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")
        )
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(device: torch.device) -> float:
    """Free bytes of a device; for the host, not more than the limit of its container leaves."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    limits = [float("inf")]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits += [
            float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        ]
        group = Path("/sys/fs/cgroup")  # a container's own limit
        limits.append(
            float((group / "memory.max").read_text())
            - float((group / "memory.current").read_text())
        )
    except (OSError, ValueError):  # another system, or no limit
        pass
    return min(limits)
