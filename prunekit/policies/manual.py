"""Shares written down by hand, in the configuration or in a CSV file."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from prunekit.errors import ConfigError, suggest
from prunekit.policies.base import Policy, Setting, spread_over_depth

_HEADER = ["group", "share"]


@dataclass(frozen=True, kw_only=True)
class Manual(Policy):
    """A number ≥ 0 per layer or per group: proportions hold, their scale is set by the target.

    Args:
        values: the numbers, one a layer.
        path: a CSV file instead, with a line for each layer and the number in its last column,
            under a header if there is one; or with all numbers in one line; or, under the header
            `group,share`, with a line for each group.
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

    def group_shares(self, setting: Setting) -> dict[str, float]:
        """The share of each group, or that of its layer."""
        if self.path is not None and self._rows and _strip(self._rows[0]) == _HEADER:
            return _look_up(self.path, self._rows[1:], setting)
        return spread_over_depth(setting, self.shares)

    def shares(self, depth: int) -> list[float]:
        """The numbers as given, for so many layers."""
        if self.path is None:
            key, given = "policy.values", [str(value) for value in self.values or ()]
        else:
            key, given = self.path, _find_cells(self._rows)
        values = [_parse_number(key, text) for text in given]
        if len(values) != depth:
            raise ConfigError(f"{key}: expected {depth} numbers, one a layer, got {len(values)}")
        _check_values(key, values)
        return values

    @cached_property
    def _rows(self) -> list[list[str]]:
        """The rows of the CSV file, which is read once."""
        assert self.path is not None
        return _read_rows(self.path)


def _check_values(key: str, values: Sequence[float]) -> None:
    if min(values) < 0 or max(values) == 0 or math.inf in values:
        raise ConfigError(f"{key}: expected numbers ≥ 0, not all zero, got {values}")


def write_shares(shares: Mapping[str, float]) -> str:
    """The text of a CSV file with the share of each group, for `path`."""
    return "".join(
        f"{','.join(row)}\n" for row in [_HEADER, *((n, f"{s!r}") for n, s in shares.items())]
    )


def _look_up(path: str, rows: Sequence[Sequence[str]], setting: Setting) -> dict[str, float]:
    """The shares of the groups that are cut, from rows of a name and a number."""
    given = {row[0].strip(): _parse_number(path, row[-1].strip()) for row in rows}
    known = {group.name for group in (*setting.graph.groups, *setting.graph.stacks)}
    for name in given.keys() - known:
        raise ConfigError(f"{path}: {name!r} is no group: {suggest(name, sorted(known))}")
    missing = [group.name for group in setting.groups if group.name not in given]
    if missing:
        raise ConfigError(f"{path}: expected a share for each group, got none for {missing[0]}")
    shares = {group.name: given[group.name] for group in setting.groups}
    _check_values(path, list(shares.values()))
    return shares


def _strip(row: Sequence[str]) -> list[str]:
    return [cell.strip() for cell in row]


def _find_cells(rows: Sequence[Sequence[str]]) -> list[str]:
    """The cells of a CSV file that hold the numbers."""
    if len(rows) == 1:
        return _strip(rows[0])
    cells = [row[-1].strip() for row in rows]
    headed = bool(cells) and not _is_number(cells[0])
    return cells[1:] if headed else cells


def _read_rows(path: str) -> list[list[str]]:
    """The rows of a CSV file that are not empty."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            return [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"policy.path: can't read {path}: {reason}") from error


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
