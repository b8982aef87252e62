"""The processes that torchrun started, as the environment tells before a process group exists."""

from __future__ import annotations

import os


def launched_rank() -> int:
    """The number of this process among them, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def count_launched() -> int:
    """How many there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
