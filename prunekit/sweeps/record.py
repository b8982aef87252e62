"""What became of each run of a sweep: a small file a run, in the folder `.sweep`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prunekit.errors import CheckpointError
from prunekit.runtime.files import write_text

FOLDER = ".sweep"
RUNNING, DONE, FAILED, INTERRUPTED = "running", "done", "failed", "interrupted"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of a sweep.

    Attributes:
        number: the number in its folder's name.
        folder: its folder, from the sweep's folder on.
        overrides: what tells it from the other runs, sorted (`naming.identity`).
        values: swept key → its value, as text.
        status: running, done, failed or interrupted; of a run that was killed, running.
        error: why it failed, in one line.
        seconds: wall-clock time, of all that it took to come to its end or to fail.
        started: the sweep that last started it: its time and process.
        job: its place in that sweep.
    """

    number: int
    folder: str
    overrides: tuple[str, ...]
    values: Mapping[str, str]
    status: str = RUNNING
    error: str | None = None
    seconds: float | None = None
    started: str = ""
    job: int = 0

    def ends(self, status: str, seconds: float, error: str | None = None) -> Record:
        """The same run at its end."""
        return replace(self, status=status, seconds=seconds, error=error)


class Records:
    """The records of a sweep's folder."""

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self._folder = sweep / FOLDER

    def all(self) -> list[Record]:
        """The records of all runs that began, by their numbers.

        Raises:
            CheckpointError: a damaged record.
        """
        found = [_read(path) for path in self._folder.glob("*.json")]
        return sorted(found, key=lambda record: (record.number, record.folder))

    def find(self, overrides: tuple[str, ...]) -> Record | None:
        """The run with these overrides that began last, if any did."""
        found = [record for record in self.all() if record.overrides == overrides]
        return found[-1] if found else None

    def write(self, record: Record) -> None:
        """Keep what became of a run. Raises CheckpointError where the disk refuses."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = record.folder.replace("/", "~")
        write_text(self._folder / f"{name}.json", json.dumps(asdict(record), indent=1))


def _read(path: Path) -> Record:
    """The record in a file. Raises CheckpointError where it is damaged."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**plain, "overrides": tuple(plain["overrides"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: expected the record of a run of a sweep, got a damaged file "
            f"({type(error).__name__}); remove it, and its run begins anew"
        ) from error
