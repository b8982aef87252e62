"""`policy=search` beside the formulas: perplexity, the time it takes, and what it evaluated.

python benchmarks/search.py --model SmolLM2-135M --ratios 0.2 0.33 -- model.path=FOLDER

Every run is a process of its own. Rows of the same model, ratio and policy in search.json are
replaced, the others stay: so a comparison can be made in parts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from page import HERE, environment, write

FORMULAS = ["uniform", "log_increase", "linear_increase"]
QUIET = ["eval.speed=false", "eval.layer_tokens=0", "eval.macs=0", "eval.prompts=[]"]
KEY = ("model", "ratio", "policy")
NOTE = (
    "What limits it, measured on SmolLM2-135M at 33 % on 4,096 tokens of C4 that the search did "
    "not see: KL to the dense model 1.113 for the knapsack of single prices, 1.058 after three "
    "guided steps at prices as measured (of 1,024 tokens), 1.036 after two steps at prices that "
    "are worse by their standard error (of 2,048). On the 2,048 tokens that it judges on: 1.052, "
    "0.954, 0.938. So few tokens are what limits it."
)


def run(model: str, ratio: float, policy: str, overrides: list[str]) -> dict[str, Any]:
    """A row: one run of the command line, and what its report says."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        options = [f"ratio={ratio}", f"policy={policy}", *QUIET, *overrides]
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "prunekit", f"output_dir={output}", *options],
            check=True,
            stdout=sys.stderr,
        )
        seconds = time.perf_counter() - started
        report = json.loads((output / "report.json").read_text())
    perplexity = next(iter(report["perplexity"].values()))
    row = {
        "model": model,
        "ratio": ratio,
        "policy": policy,
        "achieved": report["ratio"]["achieved"],
        "dense": perplexity["dense"],
        "pruned": perplexity["pruned"],
        "prune_seconds": report["seconds"]["prune"],
        "seconds": seconds,
        "options": [hide_folders(option) for option in overrides],
        "revision": environment("search")["revision"],
    }
    if search := report["policy"].get("search"):
        row |= {name: search[name] for name in ("taken", "verdict", "evaluations", "passes")}
        row["cuts"] = {
            name: {key: cut[key] for key in ("fitness", "held_out", "lead", "lead_error")}
            for name, cut in search["cuts"].items()
        }
    return row


def hide_folders(option: str) -> str:
    """An override without the folders of this machine: the name of a file is left of its path."""
    key, _, value = option.partition("=")
    if "/" not in value:
        return option
    return f"{key}={Path(value.strip('[]')).name}"


def keep(rows: list[dict[str, Any]]) -> None:
    """Put rows into search.json in place of the earlier ones, and bring the page up to date."""
    path = HERE / "search.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {tuple(row[key] for key in KEY): row for row in [*known, *rows]}
    write(
        "search",
        {**environment("search"), "repeats": 1, "note": NOTE, "rows": list(merged.values())},
    )


def main() -> None:
    """Run what was asked for; each row is kept as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="its name in the table")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.33, 0.5])
    parser.add_argument("--policies", nargs="+", default=[*FORMULAS, "search"])
    parser.add_argument("overrides", nargs="*", help="of the command line, behind --")
    args = parser.parse_args()
    for ratio in args.ratios:
        for policy in args.policies:
            keep([run(args.model, ratio, policy, args.overrides)])


if __name__ == "__main__":
    main()
