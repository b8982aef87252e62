"""`task=diff`: what two plans for one model have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunekit.config import RunConfig
from prunekit.errors import ConfigError
from prunekit.jobs.folder import ensure_empty
from prunekit.plan import PruningPlan
from prunekit.runtime.files import write_text


def run_diff(config: RunConfig, output: Path) -> list[dict[str, Any]]:
    """Compare two plans; `diff.json` in the output folder.

    Returns:
        A row for each group that either plan cuts, and one for all: `group`, units removed by the
            `first`, by the `second`, by `both`, and `jaccard` = both / either; units that only one
            removes, `only_first`, `only_second`.

    Raises:
        ConfigError: other than two plans, or plans for different models.
        TraceError: a file that is no plan.
    """
    if len(config.plans) != 2:
        raise ConfigError(
            f"plans: expected two, plans=[RUN,RUN], got {', '.join(config.plans) or 'none'}"
        )
    ensure_empty(output)
    first, second = (PruningPlan.load(_file(path)) for path in config.plans)
    if first.fingerprint != second.fingerprint:
        raise ConfigError(
            f"plans: expected two for one model, got one for {first.fingerprint} and one for {second.fingerprint}"
        )
    rows = compare(first, second)
    output.mkdir(parents=True, exist_ok=True)
    write_text(
        output / "diff.json",
        json.dumps({"plans": list(config.plans), "groups": rows}, indent=1) + "\n",
    )
    return rows


def _file(path: str) -> Path:
    run = (
        Path(path).parent if (Path(path) / "config.json").exists() else Path(path)
    )  # of a run's model, the run
    return run / "plan.json" if run.is_dir() else run


def compare(first: PruningPlan, second: PruningPlan) -> list[dict[str, Any]]:
    """The rows that `run_diff` returns."""
    rows = [
        _row(name, first.removed.get(name, []), second.removed.get(name, []))
        for name in sorted({*first.removed, *second.removed}, key=_natural)
    ]
    totals = {key: sum(row[key] for row in rows) for key in ("first", "second", "both")}
    either = totals["first"] + totals["second"] - totals["both"]
    return [
        *rows,
        {"group": "all", **totals, "jaccard": totals["both"] / either if either else 1.0},
    ]


def _row(name: str, first: Sequence[int], second: Sequence[int]) -> dict[str, Any]:
    one, other = set(first), set(second)
    return {
        "group": name,
        "first": len(one),
        "second": len(other),
        "both": len(one & other),
        "jaccard": len(one & other) / len(one | other),
        "only_first": sorted(one - other),
        "only_second": sorted(other - one),
    }


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
