"""Shares written down by hand, in the configuration or in a CSV file."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunekit.errors import ConfigError
from prunekit.policies.base import DepthPolicy


@dataclass(frozen=True, kw_only=True)
class Manual(DepthPolicy):
    """One number ≥ 0 per layer: their proportions hold, their scale is set by the target.

    Args:
        values: the numbers.
        path: a CSV file instead, with a line for each layer and the number in its last column,
            under a header if there is one; or with all numbers in one line.
    """

    values: Sequence[float] | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.values is None) == (self.path is None):
            raise ConfigError("policy: manual expects policy.values or policy.path, and not both")
        listed = isinstance(self.values, Sequence) and not isinstance(self.values, str)
        if self.values is not None and not listed:
            raise ConfigError(
                f"policy.values: expected a list of numbers, got {self.values!r}; a file is "
                "policy.path"
            )
        if self.path is not None and not isinstance(self.path, str | Path):
            raise ConfigError(f"policy.path: expected a CSV file, got {self.path!r}")

    def shares(self, depth: int) -> list[float]:
        """The numbers as given."""
        if self.path is None:
            key, given = "policy.values", [str(value) for value in self.values or ()]
        else:
            key, given = self.path, _read_cells(self.path)
        values = [_parse_number(key, text) for text in given]
        if len(values) != depth:
            raise ConfigError(f"{key}: expected {depth} numbers, one a layer, got {len(values)}")
        if min(values) < 0 or max(values) == 0 or math.inf in values:
            raise ConfigError(f"{key}: expected numbers ≥ 0, not all zero, got {values}")
        return values


def _read_cells(path: str) -> list[str]:
    """The cells of a CSV file that hold the numbers."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"policy.path: can't read {path}: {reason}") from error
    if len(rows) == 1:
        return [cell.strip() for cell in rows[0]]
    cells = [row[-1].strip() for row in rows]
    headed = bool(cells) and not _is_number(cells[0])
    return cells[1:] if headed else cells


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_number(key: str, text: str) -> float:
    if not _is_number(text) or math.isnan(float(text)):
        raise ConfigError(f"{key}: expected a number, got {text!r}")
    return float(text)
