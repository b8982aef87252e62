"""The tasks of the command line, and the same in Python; they alone know all stages."""

from prunekit.jobs.diff import run_diff
from prunekit.jobs.export import run_export
from prunekit.jobs.run import run, run_trace

__all__ = ["run", "run_diff", "run_export", "run_trace"]
