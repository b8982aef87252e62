"""Words on lm-eval's tasks: errors and notes of one line."""

from __future__ import annotations

import functools
from pathlib import Path

from prunekit.runtime.console import say


@functools.cache
def say_once(message: str) -> None:
    """Say a line the first time; the same tasks are loaded for every model of a run."""
    say(message)


def list_folder(folder: Path) -> str:
    """The names of what a folder holds, for a message."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
