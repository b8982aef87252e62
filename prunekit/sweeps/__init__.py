"""Sweeps: short names for the runs, what became of each, one table of all of them."""

from prunekit.sweeps.hooks import SweepHooks, any_failed, forget
from prunekit.sweeps.index import figures_of, objective_of, write_index
from prunekit.sweeps.launchers import join_processes
from prunekit.sweeps.record import Record, Records
from prunekit.sweeps.run import SweepRun

__all__ = [
    "Record",
    "Records",
    "SweepHooks",
    "SweepRun",
    "any_failed",
    "figures_of",
    "forget",
    "join_processes",
    "objective_of",
    "write_index",
]
