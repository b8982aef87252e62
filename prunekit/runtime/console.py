"""Output of a run while it works: progress on a terminal, plain lines elsewhere.

A library call prints nothing; the command line turns output on by `speak`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

T = TypeVar("T")
_state = {"loud": False}


def speak(loud: bool = True) -> None:
    """Turn the output of this process on or off."""
    _state["loud"] = loud


def say(message: str) -> None:
    """Print one line without markup, where output is on."""
    if _state["loud"]:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(message, markup=False)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Hold back Python's warnings, and what loggers say short of errors, during a `with` block."""
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, loggers):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Pass items through; show on a terminal how many have passed, elsewhere print a name once.

    Args:
        items: the pieces of work, one after another.
        description: a name for the work.
        total: how many items there are, where they have no length.
    """
    from rich.console import Console

    console = Console()
    if not (_state["loud"] and console.is_terminal):
        say(f"{description} …")
        yield from items
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=description)
