"""Processes that do jobs side by side; one that dies costs no more than the job it was at."""

import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

Job = dict[str, Any]
Work = Callable[[Job], Job]  # a function of a module, which a new process can import


def spread(jobs: Sequence[Job], work: Work, processes: int) -> Iterator[tuple[Job, Job]]:
    """Yield (job, result) in the order in which jobs end; `{"error": …}` where one fails.

    Jobs are begun in the order given. A process does one after another, so that what it holds
    serves them all; after a failure a new one takes its place, because a GPU may be lost to it.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Job, Job]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    for _ in range(min(processes, len(jobs))):
        threading.Thread(target=_look_after, args=(work, waiting, done), daemon=True).start()
    for _ in jobs:
        yield done.get()


def _look_after(work: Work, waiting: queue.SimpleQueue, done: queue.SimpleQueue) -> None:
    """Let a process work, and another one in its place after each failure."""
    own = None
    while True:
        try:
            job = waiting.get_nowait()
        except queue.Empty:
            return
        own = own or _start(work)
        try:
            own.send(job)
            result = own.recv()
        except (EOFError, OSError):
            result = {"error": "its process died"}
        if "error" in result:
            own.close()
            own = None
        done.put((job, result))


def _start(work: Work) -> Connection:
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    context.Process(target=_serve, args=(work, other), daemon=True).start()
    other.close()  # or else the end of the process would not be seen
    return own


def _serve(work: Work, jobs: Connection) -> None:
    """Do jobs until one fails, or until there are no more."""
    while True:
        try:
            result = work(jobs.recv())
        except EOFError:
            return
        except Exception as error:
            lines = str(error).splitlines() or [""]
            jobs.send({"error": f"{type(error).__name__}: {lines[0]}"})
            return
        jobs.send(result)
