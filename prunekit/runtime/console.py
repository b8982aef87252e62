"""What a run says while it works: progress on a terminal, plain lines elsewhere, nothing inside a
library call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_state = {"loud": False}


def speak(loud: bool = True) -> None:
    """Turn output on (the command line does) or off."""
    _state["loud"] = loud


def say(message: str) -> None:
    """One line."""
    if _state["loud"]:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(message, markup=False)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Pass the items through and show how far they are."""
    from rich.console import Console

    console = Console()
    if not (_state["loud"] and console.is_terminal):
        say(f"{description} …")
        yield from items
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=description)
