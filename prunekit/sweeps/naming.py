"""Short names for the runs of a sweep: a number, and the values of the keys that are swept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from prunekit.config import split_overrides

_LONGEST = 80  # characters of a folder's name; file systems end at 255 bytes
_LONGEST_VALUE = 24
# Keys that don't tell what a run does, so that a run is the same with and without them.
_APART = ("resume",)


def swept_keys(overrides: Sequence[str], params: Mapping[str, Any] | None) -> list[str]:
    """The keys that have several values.

    Args:
        overrides: the command line of the sweep; the last one of a key counts.
        params: `hydra.sweeper.params`, which come before the command line.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    lines = [*(f"{key}={value}" for key, value in (params or {}).items()), *overrides]
    swept: dict[str, bool] = {}
    for override in OverridesParser.create().parse_overrides(lines):
        swept[override.get_key_element().lstrip("+~")] = override.is_sweep_override()
    return [key for key, several in swept.items() if several]


def values_of(overrides: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """Swept key → its value in one run, as text without quotes; "" where a run has none."""
    given = dict(split_overrides(overrides))
    return {key: given.get(key, "").strip("'\"") for key in keys}


def identity(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that tell one run of a sweep from another, sorted."""
    return tuple(sorted(o for o in overrides if o.partition("=")[0].lstrip("+") not in _APART))


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Swept key → its last part, where no other key ends alike: data.calibration.seed, seed."""
    ends = [re.split(r"[./]", key)[-1] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}


def folder_name(number: int, values: Mapping[str, str]) -> str:
    """The folder of a run: `003_method-slimgpt_ratio-0.2`.

    It needs no quotes on a command line, be it the shell's or Hydra's, and has no slashes.
    """
    short = short_keys(list(values))
    parts = [f"{_plain(short[key])}-{_plain(value)}" for key, value in values.items()]
    return "_".join([f"{number:03d}", *parts])[:_LONGEST].rstrip("_-.")


def _plain(value: str) -> str:
    """A value without what shells and file systems read as something else; of a path, its end."""
    end = value.rstrip("/").rpartition("/")[2] if re.fullmatch(r"[\w./~-]+", value) else value
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", end).strip("_")[:_LONGEST_VALUE]
