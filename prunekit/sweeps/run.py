"""One run of a sweep: whether there is anything to do, and what became of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunekit.errors import first_line
from prunekit.runtime.torchrun import launched_rank
from prunekit.sweeps.hooks import place_run
from prunekit.sweeps.index import write_index
from prunekit.sweeps.record import DONE, FAILED, INTERRUPTED, RUNNING, Record, Records


class SweepRun:
    """A run, from the configuration that Hydra composed for it.

    Attributes:
        folder: the folder of the run.
        sweep: the folder of the sweep.
    """

    def __init__(self, hydra: Any) -> None:
        self.folder = Path(hydra.runtime.output_dir)
        self.sweep = Path(hydra.sweep.dir).absolute()
        within = os.path.relpath(self.folder, self.sweep)
        self._record = replace(place_run(hydra), folder=within)
        self._records = Records(self.sweep)

    @property
    def is_done(self) -> bool:
        """Whether an equal run ended well, and what it wrote is there."""
        before = self._records.find(self._record.overrides)
        done = before is not None and before.status == DONE
        return done and self.folder.is_dir() and any(self.folder.iterdir())

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A block that does the run; what becomes of it is a row of the table, errors too."""
        begin = time.monotonic()
        self._note(replace(self._record, status=RUNNING))
        try:
            yield
        except BaseException as error:
            status = FAILED if isinstance(error, Exception) else INTERRUPTED
            self._note(self._record.ends(status, time.monotonic() - begin, first_line(error)))
            raise
        self._note(self._record.ends(DONE, time.monotonic() - begin))

    def _note(self, record: Record) -> None:
        if launched_rank():
            return  # the first process notes it
        self._records.write(record)
        if record.status != RUNNING:
            write_index(self.sweep)
