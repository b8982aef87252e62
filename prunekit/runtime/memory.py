"""Memory of the machine: what is free, what a stage took at its peak, whether an error means there
is too little.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_MMAP_THRESHOLD = -3  # mallopt's number of it


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
    """Peak bytes since `reset_peak`: allocated on a GPU, resident elsewhere (ever, where the system
    can't reset).
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
    """Memory that is free on a device."""
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
