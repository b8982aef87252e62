"""Where Hydra calls a sweep: at its start, for the name of each run's folder, at its end."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from prunekit.runtime.torchrun import launched_rank
from prunekit.sweeps.index import write_index
from prunekit.sweeps.naming import folder_name, identity, swept_keys, values_of
from prunekit.sweeps.record import FAILED, RUNNING, Record, Records

_ABOUT = "hydra.callbacks.sweep"  # the section of the configuration that is a SweepHooks


_failed: list[str] = []  # the folders of runs that failed, once a sweep of this process has ended


def forget() -> None:
    """Forget the sweep that has ended before the next one begins in this process."""
    _failed.clear()


def any_failed() -> bool:
    """Whether the table of the sweep that has ended holds a run that failed, in any process."""
    return bool(_failed)


class SweepHooks(Callback):
    """The start and the end of a sweep, in the process that began it.

    Args:
        keys: the swept keys; the sweep's start sets them, for all its runs.
        started: the sweep's time and process; set likewise.
    """

    def __init__(self, keys: list[str] | None = None, started: str | None = None) -> None:
        self.keys = keys
        self.started = started

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Tell the runs what is swept; end where the folder holds another sweep."""
        hydra = config.hydra
        folder = Path(hydra.sweep.dir)
        if launched_rank() == 0 and not config.get("resume") and Records(folder).all():
            print(
                f"prunekit: hydra.sweep.dir: {folder} holds a sweep; choose another, or let "
                "resume=true do what is missing in it",
                file=sys.stderr,
            )
            sys.exit(2)  # Hydra would turn an error into a warning
        keys = swept_keys(list(hydra.overrides.task), hydra.sweeper.get("params"))
        stamp = f"{time.time():.3f}-{os.getpid()}"
        with flag_override(config, ["readonly", "struct"], False):
            # Every launcher hands these to its runs, on whichever machine they are.
            hydra.overrides.hydra.append(f"{_ABOUT}.keys={_quoted(keys)}")
            hydra.overrides.hydra.append(f"{_ABOUT}.started='{stamp}'")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the table of all runs once more, and say where it is."""
        if launched_rank():
            return
        folder = Path(config.hydra.sweep.dir)
        records = write_index(folder)
        if not records:
            return
        _failed.extend(record.folder for record in records if record.status == FAILED)
        told = f"{len(records)} runs, {len(_failed)} failed"
        print(f"{told}; the table of all: {os.path.relpath(folder)}/sweep.html")


def _quoted(keys: list[str]) -> str:
    return "[" + ",".join(f"'{key}'" for key in keys) + "]"


def _run_folder(*, _root_: DictConfig) -> str:
    """The name of a run's folder: the one that an equal run had, or a new one."""
    return place_run(_root_.hydra).folder


def place_run(hydra: Any) -> Record:
    """The record of the run that Hydra composed, as it begins.

    An equal run of this folder is gone on with, or was done already. Where it works at this
    moment, as the same sample of a search may, this one has a folder of its own.
    """
    overrides, about = list(hydra.overrides.task), hydra.callbacks.sweep
    values = values_of(overrides, about.get("keys") or [])
    begun = Record(
        number=int(hydra.job.num),
        folder=folder_name(int(hydra.job.num), values),
        overrides=identity(overrides),
        values=values,
        started=about.get("started") or "",
        job=int(hydra.job.num),
    )
    before = Records(Path(hydra.sweep.dir)).find(begun.overrides)
    if before is None or _works_beside(before, begun):
        return begun
    return replace(begun, number=before.number, folder=before.folder)


def _works_beside(other: Record, begun: Record) -> bool:
    """Whether a record is of another run of the same sweep, which has not ended."""
    return other.status == RUNNING and other.started == begun.started and other.job != begun.job


# `conf/config.yaml` asks for it, in every process that a launcher starts.
OmegaConf.register_new_resolver("prunekit.run_folder", _run_folder, replace=True)
