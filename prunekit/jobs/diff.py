"""`task=diff`: what two plans for one model have in common."""

from __future__ import annotations

import json
from pathlib import Path

from prunekit.config import RunConfig
from prunekit.errors import ConfigError
from prunekit.jobs.folder import ensure_empty
from prunekit.plan import Overlap, PruningPlan, compare_plans
from prunekit.runtime.files import write_text


def run_diff(config: RunConfig, output: Path) -> list[Overlap]:
    """Compare two plans, and write `diff.json` into the output folder.

    Returns:
        A row for each group that either plan cuts, and a last one for all groups together.

    Raises:
        ConfigError: other than two plans, or plans for different models.
        TraceError: a file that is no plan.
    """
    if len(config.plans) != 2:
        raise ConfigError(
            f"plans: expected two, plans=[RUN,RUN], got {', '.join(config.plans) or 'none'}"
        )
    ensure_empty(output)
    first, second = (PruningPlan.load(_find_plan(path)) for path in config.plans)
    if first.fingerprint != second.fingerprint:
        raise ConfigError(
            f"plans: expected two for one model, got one for {first.fingerprint} and one for "
            f"{second.fingerprint}"
        )
    rows = compare_plans(first, second)
    output.mkdir(parents=True, exist_ok=True)
    content = {"plans": list(config.plans), "groups": [row.to_json() for row in rows]}
    write_text(output / "diff.json", json.dumps(content, indent=1) + "\n")
    return rows


def _find_plan(path: str) -> Path:
    """The plan's file: the path itself, or the plan of the run that a folder is or lies in."""
    given = Path(path)
    run = given.parent if (given / "config.json").exists() else given  # the run of a model's folder
    return run / "plan.json" if run.is_dir() else run
