"""Work in a thread beside the main one: reading and writing while the device computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """One piece of work at a time, in a thread that ends with it.

    Args:
        name: the name of the threads, for whoever looks at a stuck process.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._piece: tuple[ThreadPoolExecutor, Future[T]] | None = None

    def begin(self, work: Callable[[], T]) -> None:
        """Begin a piece of work; the result of the one before must have been taken."""
        assert self._piece is None
        pool = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._piece = pool, pool.submit(work)

    def result(self) -> T | None:
        """Wait for the piece of work that was begun, and return its result; None if there is none.

        Raises:
            BaseException: whatever the work raised.
        """
        future = self._end()
        return future.result() if future else None

    def settle(self) -> None:
        """Wait until no work is under way, and forget how it ended."""
        self._end()

    def _end(self) -> Future[T] | None:
        if self._piece is None:
            return None
        pool, future = self._piece
        pool.shutdown()  # an interrupt in here leaves the piece where `settle` finds it
        self._piece = None
        return future
