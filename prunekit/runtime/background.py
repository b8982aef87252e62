"""Work in a thread beside the main one: reading and writing while the device computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """One piece of work at a time, in a thread that ends with it.

    Args:
        name: the name of the threads, for whoever looks at a stuck process.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._piece: Future[T] | None = None

    def begin(self, work: Callable[[], T]) -> None:
        """Begin a piece of work; the result of the one before must have been taken."""
        assert self._piece is None
        pool = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._piece = pool.submit(work)
        pool.shutdown(wait=False)

    def result(self) -> T | None:
        """Wait for the piece of work that was begun, and return its result; None if there is none.

        Raises:
            BaseException: whatever the work raised.
        """
        if self._piece is None:
            return None
        wait([self._piece])  # an interrupt leaves the piece where `settle` finds it
        piece, self._piece = self._piece, None
        return piece.result()

    def settle(self) -> None:
        """Wait until no work is under way, and forget how it ended."""
        if self._piece is not None:
            wait([self._piece])
            self._piece = None
