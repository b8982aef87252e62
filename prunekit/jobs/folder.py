"""The folder that a run writes: empty before, and afterwards whole or empty again."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.errors import CheckpointError, PrunekitError
from prunekit.jobs.updates import UPDATES
from prunekit.policies.manual import write_shares
from prunekit.report import Report, pictures, render_html, render_markdown, write_pictures
from prunekit.runtime.files import write_text

if TYPE_CHECKING:
    from prunekit.jobs.job import Finished

PARTIAL = ".model.partial"  # a streamed model's layers until it is finished
SHARES = "shares.csv"  # what policy=manual takes


def ensure_empty(folder: Path, besides: Collection[str] = ()) -> None:
    """Raise CheckpointError where the output folder holds anything `besides` some names."""
    if folder.is_file() or (
        folder.is_dir() and any(path.name not in besides for path in folder.iterdir())
    ):
        raise CheckpointError(
            f"output_dir: {folder} exists and is not empty; choose another or remove it"
        )


def clear_halves(output: Path) -> None:
    """Remove unfinished files and folders that a killed export left."""
    for path in [*output.glob(".*.tmp"), *output.glob(".model.*")]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def clear_results(output: Path) -> None:
    """Remove the files and folders of `write_run`, finished or not."""
    drawings = [f"{name}.svg" for name in ("layers", "ratio", "search", "error", "curve", "tasks")]
    names = ["report.json", "report.md", "report.html", "plan.json", SHARES, UPDATES]
    names += ["model", "adapter", *drawings]
    half = [path for name in names for path in output.glob(f".{name}.*") if path.name != PARTIAL]
    for path in [*(output / name for name in [*names, ".hydra"]), *half]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_run(
    output: Path,
    report: Report,
    provenance: Mapping[str, str],
    result: Finished | None = None,
    remote_code: bool = False,
) -> None:
    """Write the run folder, `report.json` last; on any failure nothing of it stays."""
    try:
        (output / ".hydra").mkdir(parents=True, exist_ok=True)
        for name, text in provenance.items():
            write_text(output / ".hydra" / name, text)
        if result is not None:
            result.write(output, report, remote_code)
        policy = report.policy
        if policy is not None and (report.task == "search" or policy.search is not None):
            write_text(output / SHARES, write_shares(policy.shares))
        drawn = pictures(report)
        write_pictures(drawn, output)
        write_text(output / "report.md", render_markdown(report))
        write_text(output / "report.html", render_html(report, drawn))
        write_text(output / "report.json", report.to_json())
    except BaseException as error:
        clear_results(output)
        if isinstance(error, OSError):
            raise PrunekitError(f"{output}: can't be written: {error.strerror}") from error
        raise
