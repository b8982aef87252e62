"""`policy=search` beside the formulas: perplexity, the time it takes, and what it evaluated.

    python benchmarks/search.py --runs demo.jsonl --processes 2 --seconds 3600
    python benchmarks/search.py --runs smollm2.jsonl --model SmolLM2-135M --processes 8 \
        --effort policy.tokens=[2048,16384] --also "search importance.outputs=full" -- \
        model.path=FOLDER data.calibration.path=c4.jsonl eval.corpora=[wiki.test.raw]
    python benchmarks/search.py --runs stories.jsonl --model stories260K --split stories.jsonl \
        -- model.path=FOLDER
    python benchmarks/search.py --runs smollm2.jsonl --gather

Every run leaves a line in the file as soon as it is done; a run that is there is not made again,
one that failed is. What says most comes first: the first two ratios, the search and the formulas
over the depth, with the first seed; then what is tried beside them, then other seeds. Several
processes share a GPU, or the processor's cores, with one thread each. Gathered rows take the place
of those of the same model, ratio, policy and seed in search.json; the others stay.
"""

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from omegaconf import DictConfig, OmegaConf
from page import HERE, environment, write
from workers import Job, make_rows, read_rows

POLICIES = ["search", "sensitivity", "owl", "uniform", "log_increase", "linear_increase"]
LATER = ["sensitivity", "owl"]  # which measure, and have not been the best yet
UNTOLD = ("hydra", "output_dir", "corpora")  # of a configuration
LEADING = 2  # ratios that come first
DETAILS = ("settings", "rounds", "shares", "stages")  # of the runs' files alone
KEY = ("model", "ratio", "policy", "seed")
NOTE = (
    "What limits it, measured on SmolLM2-135M at 33 % on 4,096 tokens of C4 that the search did "
    "not see: KL to the dense model 1.113 for the knapsack of single prices, 1.058 after three "
    "guided steps at prices as measured (of 1,024 tokens), 1.036 after two steps at prices that "
    "are worse by their standard error (of 2,048). On the 2,048 tokens that it judges on: 1.052, "
    "0.954, 0.938. So few tokens are what limits it. Coarse heads are not: by log_increase and 128 "
    "× 128 tokens on an H100 (benchmarks/tokens.py), 20 % cost 120.4 with key-value heads and "
    "FFNs, 133.0 with query heads beside them, 115.0 with FFNs alone; 50 % 529, 2,762 and 767; "
    "where groups compete by the loss 111.0, 113.1, 105.0 and 353, 460, 455. SmolLM2-135M on an "
    "H100: twelve processes shared it, and no search ended in their 350 s; an exact cut took 22 to "
    "27 s. stories260K: four fifths of the stories calibrate, the last fifth is evaluated; its "
    "first three tables are of revision 795df1a, their seconds, and many of the options', of a "
    "processor that had other work to do. Since then the knapsack's prices are taken beside the "
    "best formula's levels, not beside a dense model. Exact cuts of SmolLM2-135M at 33 % (64 × 128 "
    "tokens), KL on 8,192 other tokens: 1.101 so, 1.216 from single prices (the difference is "
    "0.115 ± 0.031), 1.321 for log_increase; on stories260K it gains nothing (8.02 and 8.00 at 20 "
    "%, 14.30 and 14.26 at 33 %, means of three seeds), nor on the embedded model (14.67 and 14.63 "
    "at 20 %, one seed), nor in SmolLM2-135M's perplexity at 33 %: 150.97 so, 149.79 before, on a "
    "processor that had other work to do. What limits it on stories260K is the database: levels "
    "fit the inputs that the cut in its middle gives, and speak for that cut. In most rounds "
    "neither guided steps nor children found anything better there, whatever their number, while "
    "the knapsack of the same levels' prices, cut exactly, was (KL 0.945 against 0.992 for the cut "
    "in the middle, at 33 %). So every round packs a knapsack of its own, and the best other "
    "candidate is cut exactly: at 33 % 13.20 (three draws) where two rounds with a single knapsack "
    "gave 13.53. The options of such a search are in a table of their own; most are of one draw. "
    "There expected_loss among the seeds and a quarter held out instead of an eighth gave 13.53 "
    "instead of 14.11 at 33 %, 30.29 instead of 31.15 at 50 %, 7.96 instead of 7.89 at 20 % (three "
    "draws each); steps, levels, guided steps, generations, children and rounds changed nothing at "
    "33 %, as the knapsack was taken anyway, and half as many tokens were worse; at 20 % other "
    "steps were worse. All searches of the embedded model, of stories260K's first three tables, "
    "and those of SmolLM2-135M that say policy.rounds=1, are of two rounds or one, with a single "
    "knapsack, and without expected_loss among the seeds. On stories260K, policy.rounds=4 takes "
    "the cut that three rounds give, in each of its draws. SmolLM2-135M at 33 % by the defaults: "
    "KL on held-out samples 1.448 for log_increase, 1.224 for expected_loss, 1.132 for the "
    "knapsack, then 1.093, 1.058 and 1.047 behind the three rounds; the generations behind the "
    "guided steps won at most 0.002 of it. That took 107.5 passes, 1,283 candidates and 67 minutes "
    "of one core without products of bfloat16, which other processes shared in between: 34 % of "
    "the tokens that were judged told prices of levels, 48 % were guided steps', 8 % generations', "
    "10 % told prices of groups alone; an exact cut took 71 s. Since then, by the defaults, a "
    "search prices levels in four parts, guesses from these which third of the moves is worth "
    "judging, takes one guided step, breeds children only where it finds nothing, prices "
    "groups alone once, cuts no knapsack exactly that the winner was found from, and has "
    "expected_loss as its one formula: it was ahead of uniform and log_increase wherever it "
    "was a seed. Seconds of one processor's time, of the search alone, with levels priced in "
    "two parts from the second round on: embedded model at 20 % 118 (255 before; 14.68, as "
    "with four parts, instead of 14.74), stories260K at 33 % 27 (35). stories260K costs 13.58 "
    "at 33 % (13.20 before, 13.60 with two parts; three draws), 29.65 at 50 % (29.65, 30.29), "
    "7.95 at 20 % (7.96 with two parts). SmolLM2-135M at 33 %, in one draw: 140.53 (46.6 "
    "passes, 626 candidates), with two parts 146.90 in 34 minutes of one core (40.5 passes, "
    "514 candidates); two parts in the first round, too, and log_increase as a seed gave "
    "142.84 in 32 minutes. KL on held-out samples was 1.072, 1.047 and 1.074: perplexity on "
    "WikiText does not follow small differences of KL on C4. Rows that say policy.prices as a "
    "pair, for the first round and the later ones, are of revisions that took it so; that of "
    "policy.prices=[4,4] policy.sweeps=2 is nearest to what a search did before; the searches "
    "of revision e837382 were told [4,4]."
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
    from prunekit.runtime.devices import pick_device

    policy, *own = job["policy"].split()
    options = [f"ratio={job['ratio']}", f"policy={policy}", "eval=figures", "eval.cache=null"]
    options += [f"data.calibration.seed={job['seed']}", *job["options"], *own]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        started = time.perf_counter()
        composed = cfg.compose([*options, f"output_dir={output}"])
        config = cfg.check(composed)
        jobs.run(config, output, kept=kept())
        seconds = time.perf_counter() - started
        report = json.loads((output / "report.json").read_text())
    device = pick_device(config.device)
    perplexity = next(iter(report["perplexity"].values()))
    row = {
        "achieved": report["ratio"]["achieved"],
        "dense": perplexity["dense"],
        "pruned": perplexity["pruned"],
        "prune_seconds": report["seconds"]["prune"],
        "seconds": seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "stages": report["seconds"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": settings(composed),
    }
    if search := report["policy"].get("search"):
        row |= {name: search[name] for name in ("taken", "verdict", "evaluations", "passes")}
        row["rounds"], row["shares"] = search["rounds"], search["cuts"][search["taken"]]["shares"]
        row["cuts"] = {
            name: {key: cut[key] for key in ("fitness", "held_out", "lead", "lead_error")}
            for name, cut in search["cuts"].items()
        }
    return row


def settings(composed: DictConfig) -> dict[str, Any]:
    """Key → value of all that a run was asked for; of a path, the name of the file."""
    plain: Any = OmegaConf.to_container(composed, resolve=True)
    flat: dict[str, Any] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            else:
                named = [value] if isinstance(value, str) else value
                if isinstance(named, list) and any("/" in str(item) for item in named):
                    value = [Path(str(item)).name for item in named]
                flat[f"{prefix}{key}"] = value

    add("", {key: value for key, value in plain.items() if key not in UNTOLD})
    return flat


def split(corpus: Path, folder: Path) -> list[str]:
    """Overrides that calibrate on four fifths of a corpus's documents and evaluate on the rest."""
    lines = corpus.read_text().splitlines(keepends=True)
    border = len(lines) - len(lines) // 5
    calibration, evaluation = (folder / f"{corpus.stem}_{part}.jsonl" for part in ("calib", "eval"))
    calibration.write_text("".join(lines[:border]))
    evaluation.write_text("".join(lines[border:]))
    return [f"data.calibration.path={calibration}", f"eval.corpora=[{evaluation}]"]


def plan(
    model: str,
    ratios: Sequence[float],
    policies: Sequence[str],
    also: Sequence[str],
    seeds: Sequence[int],
) -> list[Job]:
    """The runs, those first that say most; `also`: policies of the leading ratios and one seed."""
    jobs = []
    for ratio, policy, seed in product(ratios, [*policies, *also], seeds):
        leads = ratio in ratios[:LEADING]
        first = seed == seeds[0]
        if policy in policies:
            later = policy in LATER
            rank = 4 * later + (0 if leads and first else 2 if leads else 3)
        elif leads and first:
            rank = 1
        else:
            continue
        jobs.append((rank, {"model": model, "ratio": ratio, "policy": policy, "seed": seed}))
    return [job for _, job in sorted(jobs, key=lambda entry: entry[0])]


def gather(path: Path) -> None:
    """Put the runs of a file into search.json, and bring the page up to date."""
    known = json.loads((HERE / "search.json").read_text())["rows"]
    merged = {tuple(row[key] for key in KEY): row for row in known}
    for key, row in read_rows(path, KEY).items():
        merged[key] = {name: value for name, value in row.items() if name not in DETAILS}
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
    parser.add_argument(
        "--also", nargs="*", default=[], help="more of them, at the first ratios and seed alone"
    )
    parser.add_argument("--effort", nargs="*", default=[], help="overrides of all searches")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", type=Path, help="a file of JSON lines: calibrates, evaluates")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="stop after so long; runs so far are kept")
    parser.add_argument("overrides", nargs="*", help="of the command line, behind --")
    args = parser.parse_args()
    if args.gather:
        gather(args.runs)
        return
    done, revision = read_rows(args.runs, KEY), environment("search")["revision"]
    with tempfile.TemporaryDirectory() as folder:
        own = args.overrides + (split(args.split, Path(folder)) if args.split else [])
        same = {"revision": revision, "processes": args.processes}
        jobs = [
            {**job, **same, "options": own + args.effort * job["policy"].startswith("search")}
            for job in plan(args.model, args.ratios, args.policies, args.also, args.seeds)
            if tuple(job[key] for key in KEY) not in done
        ]
        sound = make_rows(jobs, run, args.runs, args.processes, args.seconds)
    sys.exit(not sound)


if __name__ == "__main__":
    main()
