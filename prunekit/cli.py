"""The command line: `python -m prunekit key=value …`; errors become one line and status 2."""

import logging
import os
import shlex
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prunekit.config import check, check_choices, config_dir, drop_presets, one_line
from prunekit.errors import CheckpointError, PrunekitError

_failures: list[PrunekitError] = []


def _complain(error: Exception, more: str = "") -> None:
    if os.environ.get("PRUNEKIT_TRACEBACK") == "1":
        traceback.print_exception(error)
    who = (
        f"prunekit, process {rank}" if (rank := os.environ.get("RANK", "0")) != "0" else "prunekit"
    )
    print(
        f"{who}: {error if isinstance(error, PrunekitError) else one_line(error)}{more}",
        file=sys.stderr,
    )


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _kept(folder: Path, error: Exception | None = None) -> str:
    """What to say of a state that an unfinished run left, unless the error is about it."""
    unfinished = any((folder / name).is_dir() for name in (".state", ".training"))
    if not unfinished or "resume" in str(error):
        return ""
    return f"; what was finished is kept: output_dir={os.path.relpath(folder)} resume=true goes on from there"


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _job(config: DictConfig) -> None:
    drop_presets(config, HydraConfig.get().overrides.task)
    drop_presets(config, HydraConfig.get().overrides.task)
    folder = Path(HydraConfig.get().runtime.output_dir)
    provenance = {
        "config.yaml": OmegaConf.to_yaml(config),
        "overrides.yaml": OmegaConf.to_yaml(HydraConfig.get().overrides.task),
        "hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": HydraConfig.get()})),
    }
    try:
        from prunekit import jobs
        from prunekit.report import print_summary
        from prunekit.report.couplings import print_comparison, print_groups
        from prunekit.runtime import console

        console.speak(os.environ.get("RANK", "0") == "0")
        run_config = check(config)
        if run_config.task == "trace":
            print_groups(jobs.run_trace(run_config, folder))
            return
        if run_config.task == "diff":
            print_comparison(jobs.run_diff(run_config, folder))
            return
        if run_config.task == "export":
            jobs.run_export(run_config, folder)
            _remove_if_empty(folder)  # what was only pushed leaves nothing here
            return
        command = shlex.join(["python", "-m", "prunekit", *HydraConfig.get().overrides.task])
        report = jobs.run(run_config, folder, provenance, command)
    except PrunekitError as error:  # Hydra would print a report of its own, and end a sweep
        _failures.append(error)
        _remove_if_empty(folder)
        _complain(error, _kept(folder, error))
    except KeyboardInterrupt:
        _remove_if_empty(folder)
        raise KeyboardInterrupt(_kept(folder)) from None
    else:
        if os.environ.get("RANK", "0") == "0":
            print_summary(report, Path(os.path.relpath(folder)))
        else:
            _remove_if_empty(folder)


def main() -> None:
    """Run; exit with 0, or 2 after one line on what was wrong, or 130 after Ctrl-C."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here instead of Hydra's own report
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in (
        "torchao",
        "torch.utils._pytree",
    ):  # which complain of themselves when they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    _failures.clear()
    try:
        check_choices(sys.argv[1:], config_dir())
        _job()
    except (PrunekitError, HydraException, OmegaConfBaseException) as error:
        _complain(error)
        sys.exit(2)
    except OSError as error:  # Hydra could not make the output folder
        _complain(
            CheckpointError(
                f"output_dir: {error.filename or ''}: can't be written: {error.strerror}"
            )
        )
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"prunekit: interrupted; no result was written{stop}", file=sys.stderr)
        sys.exit(130)
    if _failures:
        sys.exit(2)


if __name__ == "__main__":
    main()
