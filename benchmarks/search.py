"""`policy=search` beside the formulas: perplexity, the time it takes, and what it evaluated.

python benchmarks/search.py --runs FILE --model SmolLM2-135M --processes 12 -- model.path=FOLDER
python benchmarks/search.py --runs FILE --gather

Every run leaves a line in the file as soon as it is done; a run that is there is not made again,
one that failed is. Several processes share a GPU, or the processor's cores. Gathered rows take the
place of those of the same model, ratio, policy and seed in search.json; the others stay.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from page import HERE, environment, write
from workers import Job, make_rows, read_rows

POLICIES = ["search", "sensitivity", "owl", "uniform", "log_increase", "linear_increase"]
KEY = ("model", "ratio", "policy", "seed")
NOTE = (
    "What limits it, measured on SmolLM2-135M at 33 % on 4,096 tokens of C4 that the search did "
    "not see: KL to the dense model 1.113 for the knapsack of single prices, 1.058 after three "
    "guided steps at prices as measured (of 1,024 tokens), 1.036 after two steps at prices that "
    "are worse by their standard error (of 2,048). On the 2,048 tokens that it judges on: 1.052, "
    "0.954, 0.938. So few tokens are what limits it. stories260K: at revision 795df1a, "
    "seconds of a processor that had other work to do; four fifths of the stories calibrate, the "
    "last fifth is evaluated. Since then the knapsack's prices are taken beside the best formula's "
    "levels, not beside a dense model. Exact cuts of SmolLM2-135M at 33 % (64 × 128 tokens), KL on "
    "8,192 other tokens: 1.101 so, 1.216 from single prices (the difference is 0.115 ± 0.031), "
    "1.321 for log_increase; on stories260K it gains nothing (8.02 and 8.00 at 20 %, 14.30 and "
    "14.26 at 33 %, means of three seeds), nor on the embedded model (14.67 and 14.63 "
    "at 20 %, one seed), nor in SmolLM2-135M's perplexity at 33 %: 150.97 so, 149.79 before, on a "
    "processor that had other work to do."
)


@functools.cache
def kept() -> Any:
    """What the runs of this process have in common: texts, the dense model and its figures."""
    from prunekit.jobs.kept import Kept

    torch.set_num_threads(1)
    return Kept()


def run(job: Job) -> dict[str, Any]:
    """A row: one run as the command line makes it, and what its report says."""
    from prunekit import config as cfg
    from prunekit import jobs

    policy, *own = job["policy"].split()
    options = [f"ratio={job['ratio']}", f"policy={policy}", "eval=figures", "eval.cache=null"]
    options += [f"data.calibration.seed={job['seed']}", *job["options"], *own]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        started = time.perf_counter()
        config = cfg.check(cfg.compose([*options, f"output_dir={output}"]))
        jobs.run(config, output, kept=kept())
        seconds = time.perf_counter() - started
        report = json.loads((output / "report.json").read_text())
    perplexity = next(iter(report["perplexity"].values()))
    row = {
        "achieved": report["ratio"]["achieved"],
        "dense": perplexity["dense"],
        "pruned": perplexity["pruned"],
        "prune_seconds": report["seconds"]["prune"],
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    if search := report["policy"].get("search"):
        row |= {name: search[name] for name in ("taken", "verdict", "evaluations", "passes")}
        row["cuts"] = {
            name: {key: cut[key] for key in ("fitness", "held_out", "lead", "lead_error")}
            for name, cut in search["cuts"].items()
        }
    return row


def gather(path: Path) -> None:
    """Put the runs of a file into search.json, and bring the page up to date."""
    known = json.loads((HERE / "search.json").read_text())["rows"]
    merged = {tuple(row[key] for key in KEY): row for row in known} | read_rows(path, KEY)
    write(
        "search",
        {**environment("search"), "repeats": 1, "note": NOTE, "rows": list(merged.values())},
    )


def main() -> None:
    """Make the runs that were asked for and are not there yet; or gather them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="their file, a JSON object a line")
    parser.add_argument("--gather", action="store_true", help="bring search.json up to date")
    parser.add_argument("--model", default="demo", help="its name in the table")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.33, 0.5])
    parser.add_argument(
        "--policies", nargs="+", default=POLICIES, help='also as "search policy.rounds=1"'
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="stop after so long; runs so far are kept")
    parser.add_argument("overrides", nargs="*", help="of the command line, behind --")
    args = parser.parse_args()
    if args.gather:
        gather(args.runs)
        return
    jobs = [
        {"model": args.model, "ratio": ratio, "policy": policy, "seed": seed}
        for ratio in args.ratios
        for policy in args.policies  # what takes longest first
        for seed in args.seeds
    ]
    done, revision = read_rows(args.runs, KEY), environment("search")["revision"]
    jobs = [
        {**job, "options": args.overrides, "revision": revision}
        for job in jobs
        if tuple(job[key] for key in KEY) not in done
    ]
    sys.exit(not make_rows(jobs, run, args.runs, args.processes, args.seconds))


if __name__ == "__main__":
    main()
