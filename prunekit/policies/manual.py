"""Shares written down by hand, in the configuration or in a CSV file."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prunekit.errors import ConfigError
from prunekit.policies.base import DepthPolicy


@dataclass(frozen=True, kw_only=True)
class Manual(DepthPolicy):
    """One number ≥ 0 per layer; their proportions hold, their scale is set by the target.

    `path`: a CSV file instead of `values`: a layer a line, the number in its last column, under a
    header if there is one; or all numbers in one line.
    """

    values: Sequence[float] | None = field(default=None)
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.values is None) == (self.path is None):
            raise ConfigError("policy: manual expects policy.values or policy.path, and not both")

        if isinstance(self.values, str):
            raise ConfigError(
                f"policy.values: expected a list of numbers, got {self.values!r}; a file is policy.path"
            )

    def shares(self, depth: int) -> list[float]:
        """The list as given."""
        key, given = (
            ("policy.values", self.values)
            if self.path is None
            else (self.path, self._read(self.path))
        )
        values = [_number(key, value) for value in given or ()]
        if len(values) != depth:
            raise ConfigError(f"{key}: expected {depth} numbers, one a layer, got {len(values)}")
        if min(values) < 0 or max(values) == 0 or not max(values) < float("inf"):
            raise ConfigError(f"{key}: expected numbers ≥ 0, not all zero, got {values}")
        return values

    def _read(self, path: str) -> list[str]:
        try:
            with Path(path).open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(
                f"policy.path: can't read {path}: {getattr(error, 'strerror', None) or error}"
            ) from error
        if len(rows) == 1:
            return [cell.strip() for cell in rows[0]]
        cells = [row[-1].strip() for row in rows]
        return cells[1:] if cells and not _is_number(cells[0]) else cells


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(key: str, value: object) -> float:
    if not _is_number(str(value)) or float(str(value)) != float(str(value)):
        raise ConfigError(f"{key}: expected a number, got {value!r}")
    return float(str(value))
