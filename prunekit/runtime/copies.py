"""Copies between a GPU and pinned host memory, which run beside the work of the GPU.

Each direction has a stream of its own. Streams wait for one another on the GPU; the host waits for
nothing. All device memory belongs to the stream that works, so that it is used again in its order.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

Event = torch.cuda.Event
_LEAVING = 2  # tensors that may be on their way to the host while the GPU goes on


class Copies:
    """Begins copies; `Event`s say when they are done.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._out, self._into = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._leaving: deque[tuple[Event, Tensor]] = deque()

    def take(self, tensor: Tensor) -> tuple[Tensor, Event]:
        """Begin to copy a tensor to the host, which nobody may write to from now on.

        Returns:
            The copy, pinned and contiguous, and when it is written.
        """
        self._let_go(_LEAVING - 1)
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._out):
            pinned.copy_(tensor, non_blocking=True)
        written = self._out.record_event()
        self._leaving.append((written, tensor))
        return pinned, written

    def bring(self, pinned: Tensor, written: Event) -> tuple[Tensor, Event]:
        """Begin to copy what `take` returned to the device.

        Returns:
            The tensor, and when it is there: `await_copy` goes before its use and its end.
        """
        tensor = torch.empty(pinned.shape, dtype=pinned.dtype, device=self.device)
        self._into.wait_stream(torch.cuda.current_stream(self.device))
        self._into.wait_event(written)
        with torch.cuda.stream(self._into):
            tensor.copy_(pinned, non_blocking=True)
        return tensor, self._into.record_event()

    def await_copy(self, done: Event) -> None:
        """Let the GPU's next work begin after a copy."""
        torch.cuda.current_stream(self.device).wait_event(done)

    def close(self) -> None:
        """Let go of the tensors that are on their way to the host."""
        self._let_go(0)

    def _let_go(self, left: int) -> None:
        """Let go of all but so many tensors; what uses their memory next waits for their copies."""
        while len(self._leaving) > left:
            done, _ = self._leaving.popleft()
            self.await_copy(done)
