"""The command line: `python -m prunekit key=value …`; errors become one line and status 2."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prunekit.config import RunConfig, check, check_choices, config_dir, one_line, settle
from prunekit.errors import CheckpointError, PrunekitError
from prunekit.runtime.torchrun import launched_rank
from prunekit.sweeps import SweepRun, any_failed, forget, join_processes, objective_of

if TYPE_CHECKING:
    from prunekit.jobs.kept import Kept

# Loggers that warn of problems of their own package when it is imported.
_COMPLAINERS = ("torchao", "torch.utils._pytree")
# When the process ends its memory goes as a whole: nobody need look for cycles in it, for 2 s.
atexit.register(gc.freeze)
# The errors of failed runs of a sweep: Hydra goes on with its other runs.
_failures: list[Exception] = []
# What the runs of a sweep have in common, once the first one has begun.
_sweep: list[Kept] = []


def main() -> None:
    """Run; exit with 0, with 2 after an error in one line, or with 130 after Ctrl-C."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of Hydra's own report
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quieten()
    _failures.clear()
    forget()
    try:
        check_choices(sys.argv[1:], config_dir())
        _job()
    except (PrunekitError, HydraException, OmegaConfBaseException) as error:
        _print_error(error)
        sys.exit(2)
    except BrokenPipeError:  # the reader of what is printed has gone, as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # Hydra could not make the output folder
        folder, reason = error.filename or "", error.strerror
        _print_error(CheckpointError(f"output_dir: {folder}: can't be written: {reason}"))
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"prunekit: interrupted; no result was written{stop}", file=sys.stderr)
        sys.exit(130)
    finally:
        _sweep.clear()
    if _failures or any_failed():
        sys.exit(2)


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _job(config: DictConfig) -> Any:
    """One run; Hydra calls it, once for each run of a sweep.

    A launcher takes this function to other processes, where all else is imported.
    """
    return _run_alone(config) if HydraConfig.get().mode is RunMode.RUN else _run_in_sweep(config)


def _run_alone(config: DictConfig) -> None:
    """A run that is no part of a sweep."""
    try:
        _attempt(config)
    except PrunekitError as error:  # Hydra would print a report of its own
        _failures.append(error)


def _run_in_sweep(config: DictConfig) -> float | tuple[float, ...] | None:
    """A run of a sweep: an error of any kind is a row of its table, and the other runs go on.

    Returns:
        What a sweeper that searches is told; None where the sweeper takes all combinations.
    """
    _quieten()  # a launcher may have started this process
    join_processes(HydraConfig.get())
    run = SweepRun(HydraConfig.get())
    searches = "BasicSweeper" not in HydraConfig.get().sweeper._target_
    try:
        if not run.is_done:
            with run.noted():
                _attempt(config)
        return objective_of(run.folder, config.objective) if searches else None
    except Exception as error:
        _failures.append(error)
        if not isinstance(error, PrunekitError):
            traceback.print_exception(error)
        if searches:
            raise  # it learns so that there is no figure
    return None


def _quieten() -> None:
    """Hold back what packages say of themselves when they are imported."""
    for name in _COMPLAINERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _attempt(config: DictConfig) -> None:
    """Do a run; print an error of the user's in a line, with what to do about it, and raise it."""
    settle(config, HydraConfig.get().overrides.task)
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        _do(config, folder)
    except PrunekitError as error:
        _print_error(error, _advise_resume(folder, error))
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_advise_resume(folder)) from None
    finally:  # after an error, after an upload, in any process but the first
        _remove_if_empty(folder)


def _do(config: DictConfig, folder: Path) -> None:
    """Do what `task` names, and print the result."""
    run_config = check(config)  # before the imports, which take seconds
    with _without_collecting():
        from prunekit import jobs
        from prunekit.report.couplings import print_comparison, print_groups
        from prunekit.runtime import console

    console.speak(launched_rank() == 0)
    if run_config.task == "trace":
        print_groups(jobs.run_trace(run_config, folder))
    elif run_config.task == "diff":
        print_comparison(jobs.run_diff(run_config, folder))
    elif run_config.task == "export":
        jobs.run_export(run_config, folder)
    else:
        _run(config, run_config, folder)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Look for no garbage in a `with` block, nor later in what is alive when the first one ends.

    Imports leave no garbage, and modules stay: to look through them takes seconds.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once: later blocks import nothing more
            gc.freeze()
        if collected:
            gc.enable()


def _run(config: DictConfig, run_config: RunConfig, folder: Path) -> None:
    """Prune, evaluate or recover; print the figures."""
    from prunekit import jobs
    from prunekit.report import print_summary

    overrides = HydraConfig.get().overrides.task
    provenance = {
        "config.yaml": OmegaConf.to_yaml(config),
        "overrides.yaml": OmegaConf.to_yaml(overrides),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": HydraConfig.get()})),
    }
    command = shlex.join(["python", "-m", "prunekit", *overrides])
    report = jobs.run(run_config, folder, provenance, command, _kept())
    if launched_rank() == 0:
        print_summary(report, Path(os.path.relpath(folder)))


def _kept() -> Kept | None:
    """What the runs of this sweep have in common; None where this is no sweep."""
    if HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    from prunekit.jobs.kept import Kept

    if not _sweep:
        _sweep.append(Kept())
    return _sweep[0]


def _print_error(error: Exception, advice: str = "") -> None:
    if os.environ.get("PRUNEKIT_TRACEBACK") == "1":
        traceback.print_exception(error)
    rank = launched_rank()
    name = f"prunekit, process {rank}" if rank else "prunekit"
    text = str(error) if isinstance(error, PrunekitError) else one_line(error)
    print(f"{name}: {text}{advice}", file=sys.stderr)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _advise_resume(folder: Path, error: Exception | None = None) -> str:
    """Tell how to go on with an unfinished run, unless the error is about going on."""
    unfinished = any((folder / name).is_dir() for name in (".state", ".training"))
    if not unfinished or "resume" in str(error):
        return ""
    key = "output_dir"
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        key, folder = "hydra.sweep.dir", Path(HydraConfig.get().sweep.dir)
    path = os.path.relpath(folder)
    return f"; what was finished is kept: {key}={path} resume=true goes on from there"


if __name__ == "__main__":
    main()
