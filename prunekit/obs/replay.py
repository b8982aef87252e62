"""Work of many small operations, which a GPU is given as one: a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch


def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """Capture `work` once, without doing it; calling the result does all of it at once.

    The work must be the same each time, on the same tensors, and must not wait for the device. It
    must have been done before, so that its kernels are loaded.

    Returns:
        None where the device has no graphs, or fails to capture this one.
    """
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    aside = _stream_aside(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    try:
        # `torch.cuda.graph` would also wait for the device, collect garbage and empty the cache.
        with torch.cuda.device(device), torch.cuda.stream(aside):
            torch.cuda.current_blas_handle()  # its workspace must not be a part of the graph
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"columns go one by one, without a CUDA graph: {reason}", stacklevel=2)
        return None
    torch.cuda.current_stream(device).wait_stream(aside)
    return graph.replay


@cache
def _stream_aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures on a device: every stream keeps a workspace of its own."""
    return torch.cuda.Stream(device)
