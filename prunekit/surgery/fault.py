"""What a check finds wrong with a cut model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong with a cut model.

    Args:
        text: the fault in words.
        group: the name of the group where it lies, if that is known.
        path: the path of the module where it was seen, if that is known.
        runs: whether the cut model runs at all.
    """

    text: str
    group: str | None = None
    path: str | None = None
    runs: bool = True
