"""Processes that do jobs side by side, and the file that their results go to, a line each.

A process that dies costs no more than the job it was at, and a run that is broken off no more than
the jobs that were not done yet.
"""

import json
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Work = Callable[[Job], Job]  # a function of a module, which a new process can import


def spread(
    jobs: Sequence[Job], work: Work, processes: int, seconds: float | None = None
) -> Iterator[tuple[Job, Job]]:
    """Yield (job, result) in the order in which jobs end; `{"error": …}` where one fails.

    Jobs are begun in the order given. A process does one after another, so that what it holds
    serves them all; after a failure a new one takes its place, because a GPU may be lost to it.
    After so many `seconds` the processes end, whatever they are at: unfinished jobs have no result.
    """
    end = None if seconds is None else time.monotonic() + seconds
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Job, Job]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    before = set(multiprocessing.active_children())
    for _ in range(min(processes, len(jobs))):
        threading.Thread(target=_look_after, args=(work, waiting, done), daemon=True).start()
    for _ in jobs:
        try:
            yield done.get(timeout=None if end is None else max(end - time.monotonic(), 0))
        except queue.Empty:
            break
    with suppress(queue.Empty):  # or else new processes would take up what is left
        while True:
            waiting.get_nowait()
    for process in set(multiprocessing.active_children()) - before:
        process.terminate()


def make_rows(
    jobs: Sequence[Job], work: Work, path: Path, processes: int, seconds: float | None = None
) -> bool:
    """Do jobs, and append a line for each to a file as it ends; whether none of them failed.

    A line is the job with its result, without the folders of this machine in its `options`.
    """
    sound = True
    if path.exists() and not (text := path.read_text(encoding="utf-8")).endswith("\n"):
        path.write_text(text + "\n", encoding="utf-8")  # a line was cut off
    for job, result in spread(jobs, work, processes, seconds):
        row = {**job, **result, "options": [hide_folders(option) for option in job["options"]]}
        line = json.dumps(row)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
        sound = sound and "error" not in result
    return sound


def read_rows(path: Path, key: Sequence[str]) -> dict[tuple, Job]:
    """The rows of a file that did not fail, by the values of these keys; none without the file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # a line that was cut off when its writer was killed
            rows.append(json.loads(line))
    return {tuple(row[name] for name in key): row for row in rows if "error" not in row}


def hide_folders(option: str) -> str:
    """An override without the folders of this machine: the name of a file is left of its path."""
    key, equals, value = option.partition("=")
    names = [Path(part).name for part in value.strip("[]").split(",")]
    return f"{key}{equals}{','.join(names)}" if "/" in value else option


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
    """Do jobs until one fails, there are no more, or the process that gives them ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
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


def _end_with_parent() -> None:
    """End this process, whatever it is at, as soon as the one that started it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # a process of `_start` has one
    parent.join()
    os._exit(1)
