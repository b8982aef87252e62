"""Which choice, repair and budget cut best: one JSON line a run, from parallel processes.

    python benchmarks/tokens.py --out tokens.jsonl --model demo stories260K:FOLDER:S.jsonl:S.jsonl
    python benchmarks/tokens.py --out tokens.jsonl --phases survey finalists tasks \
        --model smollm2:FOLDER:C4.jsonl:wiki.test.raw,C4.jsonl --eval-tokens 10240 65536 \
        --tasks FOLDER --processes 5 --device cuda --seconds 400

A model is `demo`, or name:folder:calibration file:evaluation files. A file that serves both gives
its last fifth of documents to evaluation alone. Nothing is downloaded. Lines are appended as runs
end; runs that the file holds already are left out. A variant is a choice of PARTS, joined by +.

Phases: `survey` tries all variants with the first seed and length, the likeliest first;
`finalists` takes the best of them to all ratios, seeds and lengths; `tasks` the best one and the
default to lm-eval's tasks; `rest` is everything.
"""

import argparse
import copy
import functools
import json
import math
import os
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from page import environment, write
from workers import Job, make_rows, read_rows

import prunekit
import prunekit.checkpoint
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import calibration_windows, evaluation_windows
from prunekit.demo import DEMO_MODEL
from prunekit.evaluation.perplexity import perplexity

WINDOW = 128  # of the evaluation
HELD_OUT = 5  # a fifth of a file that serves both
BATCH_TOKENS = 2048  # of a forward pass of the calibration set
TOKENS = ("relative", "clipped", "without_first", "gradient")
TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
GROUPS = {"heads": "block", "mlp": "mlp", "queries": "[attention,query_head,mlp]"}
NOTE = (
    "SmolLM2-135M on an H100 that twelve processes shared (so that no times are given), calibrated "
    "on 128 × 128 tokens of the first four fifths of 1,000 documents of C4, measured on WikiText-2 "
    "and on the last fifth; its weights are dequantised from a Q4_1 file. stories260K and the "
    "embedded model on the cores beside it; stories260K with equal + expected, full alone, "
    "what is rescored and what is solved in layers on another processor, torch 2.13.0. The study "
    "was cut off after 420 s: the other variants of the script, the third draw, windows of 1,024 "
    "tokens and lm-eval's tasks were not reached. A budget that is solved inside each layer, heads "
    "against channels by the same relative error (equal + in layers), is worse than equal shares; "
    "by the loss (diagonal + in layers, loss) it is better in three of four cases, and behind one "
    "that is solved across layers. The embedded model, on the text of another Python (dense "
    "12.82): at 20 and 50 % equal 13.66 and 20.82, equal + in layers 13.86 and 21.26, diagonal + "
    "in layers, loss 13.73 and 19.68, equal + expected 13.45 and 19.90."
)
KEY = ("model", "ratio", "groups", "seed", "samples", "length", "variant", "tasks")


QUERIES = (
    "equal",
    "full + everywhere, loss",
    "full + expected",
    "full + in layers, loss",
)  # in the survey


def both(tokens: str, *more: str) -> tuple[str, ...]:
    """The options that choose and repair by the same token weights."""
    return (f"importance.tokens={tokens}", f"compensation.tokens={tokens}", *more)


def mix(*parts: str, full: bool = False) -> tuple[str, ...]:
    """The options that choose by the mean rank of several importances."""
    options = [f"importance.parts=[{','.join(parts)}]", f"importance.weights={[1] * len(parts)}"]
    options += ["importance.options={obs:{outputs:full}}"] if full else []
    return ("importance=mixed", *options)


def curves(measure: str) -> tuple[str, ...]:
    """The options that spread the cut by the measured errors of cutting each group alone."""
    return ("policy=sensitivity", f"policy.measure={measure}", "policy.by=group")


PARTS = {
    "equal": (),
    **{tokens: both(tokens) for tokens in TOKENS},
    **{f"choose {t}": (f"importance.tokens={t}",) for t in TOKENS},
    **{f"repair {t}": (f"compensation.tokens={t}",) for t in TOKENS},
    "clipped 0.9": both(
        "clipped", "importance.clip_quantile=0.9", "compensation.clip_quantile=0.9"
    ),
    "without 4": both("without_first", "importance.first_tokens=4", "compensation.first_tokens=4"),
    "diagonal": ("importance.outputs=diagonal",),
    "full": ("importance.outputs=full",),
    "swap": ("importance.refine=swap",),
    "peak_to_peak": ("importance=peak_to_peak",),
    "mixed": mix("obs", "peak_to_peak"),
    "mixed full": mix("obs", "peak_to_peak", full=True),
    "mixed taylor": mix("obs", "taylor_second", full=True),
    "mixed three": mix("obs", "peak_to_peak", "taylor_second", full=True),
    **{
        name: (f"importance={name}",)
        for name in ("wanda", "fluctuation", "taylor_first", "taylor_second", "taylor_vector")
    },
    "rescored": ("schedule.rescore=true",),
    "pruned": ("compensation.target=pruned",),
    "dense": ("compensation.target=dense",),
    "unrepaired": ("compensation=none",),
    "damped 0.01": ("schedule.damping=0.01",),
    "damped 0.1": ("schedule.damping=0.1",),
    "uniform": ("policy=uniform",),
    "linear": ("policy=linear_increase",),
    "in layers": ("scope=layer", "importance.compete=relative"),
    "in layers, loss": ("scope=layer", "importance.compete=loss"),
    "in layers, alone": ("scope=layer",),
    "everywhere": ("scope=global", "policy=uniform", "importance.compete=relative"),
    "everywhere, loss": ("scope=global", "policy=uniform", "importance.compete=loss"),
    "everywhere, alone": ("scope=global", "policy=uniform"),
    "expected": ("policy=expected_loss",),
    "curves": curves("obs"),
    "losses": curves("loss"),
    "knapsack": (
        "policy=search",
        "policy.seeds=[expected_loss,knapsack]",
        "policy.rounds=1",
        "policy.sweeps=0",
        "policy.generations=0",
    ),
}
SURVEY = (
    "equal",
    "full + everywhere, loss",
    "full + expected",
    "equal + knapsack",
    "full + knapsack",
    "equal + expected",
    "peak_to_peak + rescored + expected",
    "mixed full + rescored + expected",
    "peak_to_peak + rescored",
    "full",
    "full + choose relative + expected",
    "full + damped 0.01 + expected",
    "full + expected + dense",
    "full + expected + pruned",
    "full + expected + repair relative",
    "full + everywhere, loss + choose relative",
    "diagonal + everywhere, loss",
    "full + in layers, loss",
    "full + losses",
    "mixed full + rescored",
    "full + everywhere, loss + damped 0.01",
    "full + everywhere",
    "full + in layers",
    "full + curves",
    "mixed full + rescored + losses",
    "peak_to_peak + rescored + losses",
    "full + everywhere, loss + repair relative",
    "full + everywhere, loss + pruned",
    "full + everywhere, loss + dense",
    "full + everywhere, loss + choose gradient",
    "full + everywhere, loss + choose without_first",
    "peak_to_peak",
    "mixed full + rescored + curves",
    "peak_to_peak + rescored + curves",
    "mixed + rescored",
    "full + choose relative",
    "mixed three + rescored",
    "mixed taylor",
    "taylor_second",
    "full + damped 0.01",
    "full + uniform",
    "mixed full",
    "equal + in layers",
    "equal + everywhere",
    "equal + curves",
    "fluctuation + rescored",
    "wanda + rescored",
    "taylor_first",
    "full + linear",
    "full + damped 0.1",
    "full + pruned",
    "full + dense",
    "full + swap",
    "full + repair relative",
    "full + repair gradient",
    "diagonal",
    "relative",
    "gradient",
    "clipped",
    "clipped 0.9",
    "without_first",
    "without 4",
    "full + choose gradient",
    "fluctuation",
    "wanda",
    "taylor_vector",
    "taylor_second + rescored",
    "mixed",
    "equal + uniform",
    "equal + linear",
    "equal + in layers, alone",
    "equal + everywhere, alone",
    "equal + pruned",
    "peak_to_peak + unrepaired",
    "full + unrepaired",
    "wanda + unrepaired",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's folder, the file that it is calibrated on, and those that it is measured on."""

    name: str
    folder: str
    calibration: str
    measured: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Read name:folder:calibration:file,file, or demo."""
        if text == "demo":
            return cls(name="demo", folder="", calibration="embedded", measured=("embedded",))
        name, folder, calibration, measured = text.split(":")
        files = tuple(measured.split(","))
        return cls(name=name, folder=folder, calibration=calibration, measured=files)


class Texts:
    """A model, its tokenizer and its texts, loaded once a process.

    `measured`: name of a text with the number of its tokens → windows of it.
    """

    def __init__(self, source: Source, device: str, eval_tokens: tuple[int, ...]) -> None:
        folder, corpora = source.folder or DEMO_MODEL, {}
        self.device = device
        self.model = prunekit.from_pretrained(folder, dtype=torch.float32).to(device)
        self.tokenizer = prunekit.checkpoint.load_tokenizer(folder)
        self.documents = load_corpus(source.calibration, "calibration", corpora)
        self.measured = {}
        for file in source.measured:
            held = load_corpus(file, "eval", corpora)
            if file == source.calibration and file != "embedded":
                border = len(held) - len(held) // HELD_OUT
                self.documents, held = self.documents[:border], held[border:]
            name = Path(file).stem
            for limit in eval_tokens:
                windows = evaluation_windows(held, self.tokenizer, WINDOW, limit, name)
                self.measured[f"{name} {windows.numel()}"] = windows.to(device)

    def measure(self, model: Any) -> dict[str, float]:
        """Perplexity on each text."""
        return {
            name: round(perplexity(model, windows, name=name), 3)
            for name, windows in self.measured.items()
        }


@functools.cache
def load(source: Source, device: str, eval_tokens: tuple[int, ...]) -> Texts:
    """The texts of a source, the same for all jobs of a process."""
    torch.set_num_threads(1)
    return Texts(source, device, eval_tokens)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs have in common, but for what their lines say of it."""

    sources: dict[str, Source]
    device: str
    eval_tokens: tuple[int, ...]
    tasks_dir: Path | None

    def run(self, job: Job) -> Job:
        """Prune a copy of the model, if the ratio is not 0, and measure it."""
        texts = load(self.sources[job["model"]], self.device, self.eval_tokens)
        model = copy.deepcopy(texts.model)
        found = self._prune(texts, model, job) if job["ratio"] else {}
        found["perplexity"] = texts.measure(model)
        if job["tasks"]:
            from prunekit.evaluation.tasks import evaluate_tasks

            scores = evaluate_tasks(
                model, texts.tokenizer, TASKS, tasks_dir=self.tasks_dir, limit=job["tasks"]
            )
            found["accuracy"] = {name: round(score.value, 4) for name, score in scores.items()}
        return found

    def _prune(self, texts: Texts, model: Any, job: Job) -> Job:
        ids = calibration_windows(
            texts.documents, texts.tokenizer, job["samples"], job["length"], job["seed"]
        ).to(texts.device)
        options = [*job["options"], f"groups={GROUPS[job['groups']]}"]
        options += [f"data.calibration.batch_size={max(1, BATCH_TOKENS // job['length'])}"]
        began = time.perf_counter()
        result = prunekit.prune(model, ratio=job["ratio"], calibration=ids, overrides=options)
        seconds, removed = time.perf_counter() - began, Counter()
        for name, units in result.plan.removed.items():
            removed[result.graph[name].kind] += len(units)
        return {
            "achieved": round(result.report["ratio"]["achieved"], 4),
            "removed": removed,
            "seconds": round(seconds, 1),
        }


def make_job(args: argparse.Namespace, model: str, ratio: float, groups: str, variant: str) -> Job:
    """A run with the first seed and length, without tasks."""
    options = [option for part in variant.split(" + ") for option in PARTS[part]]
    return {
        "model": model,
        "ratio": ratio,
        "groups": groups,
        "variant": variant,
        "seed": args.seeds[0],
        "samples": args.samples,
        "length": args.lengths[0],
        "tasks": 0,
        "options": [*options, *args.override],
    }


def survey(args: argparse.Namespace, rows: list[Job]) -> list[Job]:
    """All variants once, the likeliest first; and the dense models."""
    models = [source.name for source in args.model]
    dense = [make_job(args, model, 0.0, "heads", "equal") for model in models]
    order = product(args.variants, args.survey_ratios, args.groups, models)
    return dense + [
        make_job(args, m, ratio, groups, variant) for variant, ratio, groups, m in order
    ]


def finalists(args: argparse.Namespace, rows: list[Job]) -> list[Job]:
    """The default and the best variants at all ratios, with all seeds and lengths."""
    names = [source.name for source in args.model]
    best = {(m, g): rank(rows, m, g)[: args.finalists] for m in names for g in args.groups}
    return [
        make_job(args, model, ratio, groups, variant) | {"seed": seed, "length": length}
        for length, seed, ratio in product(args.lengths, args.seeds, args.ratios)
        for (model, groups), variants in best.items()
        for variant in dict.fromkeys(["equal", *variants])
    ]


def tasks(args: argparse.Namespace, rows: list[Job]) -> list[Job]:
    """The dense model, the default and the best variant on lm-eval's tasks."""
    jobs = []
    for source in args.model:
        dense = make_job(args, source.name, 0.0, "heads", "equal")
        own = [
            make_job(args, source.name, ratio, groups, variant)
            for ratio, groups in product(args.survey_ratios, args.groups)
            for variant in dict.fromkeys(["equal", *rank(rows, source.name, groups)[:1]])
        ]
        jobs += [job | {"tasks": args.task_limit} for job in [dense, *own]]
    return jobs if args.tasks else []


def rest(args: argparse.Namespace, rows: list[Job]) -> list[Job]:
    """Everything."""
    order = product(args.lengths, args.seeds, args.variants, args.ratios, args.groups, args.model)
    return [
        make_job(args, source.name, ratio, groups, variant) | {"seed": seed, "length": length}
        for length, seed, variant, ratio, groups, source in order
    ]


def gather(args: argparse.Namespace) -> None:
    """Put the runs of files into tokens.json, and bring the page up to date."""
    found: dict[tuple, Job] = {}
    for path in reversed(args.gather):  # the first file counts where several have a run
        found |= read_rows(path, KEY)
    rows = sorted(found.values(), key=lambda row: row["ratio"])
    names = ("machine", "cpus", "threads", "torch", "revision")
    shares = {}
    for given in args.shares:
        name, _, report = given.partition(":")
        shares[name] = json.loads(Path(report).read_text())["large_tokens"]
    where = {name: rows[0][name] for name in names}
    kept = [{k: v for k, v in row.items() if k not in (*names, "command")} for row in rows]
    result = {**environment("tokens"), **where, "repeats": 1, "note": NOTE}
    write("tokens", {**result, "shares": shares, "rows": kept})


PHASES = {phase.__name__: phase for phase in (survey, finalists, tasks, rest)}


def rank(rows: list[Job], model: str, groups: str) -> list[str]:
    """The variants from best to worst: the mean over ratios of log perplexity, first text."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:
        if (row["model"], row["groups"]) == (model, groups) and row["ratio"]:
            found[row["variant"]][row["ratio"]] = math.log(next(iter(row["perplexity"].values())))
    most = max(map(len, found.values()), default=0)
    means = {name: sum(own.values()) / most for name, own in found.items() if len(own) == most}
    return sorted(means, key=lambda name: means[name])


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="file that lines are appended to")
    parser.add_argument("--gather", nargs="+", type=Path, help="files to bring tokens.json up to")
    parser.add_argument("--shares", nargs="+", default=[], help="MODEL:report.json of task=tokens")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=["survey"])
    parser.add_argument("--model", nargs="+", type=Source.parse, default=[Source.parse("demo")])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.33, 0.5])
    parser.add_argument("--survey-ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=["heads", "mlp"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[128, 1024], help="tokens of a window"
    )
    parser.add_argument("--variants", nargs="+", default=list(SURVEY))
    parser.add_argument("--finalists", type=int, default=3)
    parser.add_argument("--override", nargs="*", default=[], help="options of every run")
    parser.add_argument("--eval-tokens", nargs="+", type=int, default=[20_480])
    parser.add_argument("--tasks", type=Path, help="folder of lm-eval's tasks, for that phase")
    parser.add_argument("--task-limit", type=int, default=200, help="questions of each task")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, help="stop after so long; runs so far are kept")
    args = parser.parse_args(arguments)
    if not args.out and not args.gather:
        parser.error("expected --out FILE, or --gather FILE")
    for part in {part for variant in args.variants for part in variant.split(" + ")} - {*PARTS}:
        parser.error(f"--variants: expected parts among {', '.join(PARTS)}, got {part!r}")
    return args


def main(arguments: list[str]) -> int:
    """Share the runs among processes, phase by phase; exit status 1 where one of them failed."""
    args, began, sound = parse(arguments), time.monotonic(), True
    if args.gather:
        gather(args)
        return 0
    sources = {source.name: source for source in args.model}
    bench = Bench(
        sources=sources,
        device=args.device,
        eval_tokens=tuple(args.eval_tokens),
        tasks_dir=args.tasks,
    )
    where = environment("tokens")
    for phase in args.phases:
        left = None if args.seconds is None else args.seconds - (time.monotonic() - began)
        rows = read_rows(args.out, KEY)
        jobs = {tuple(job[k] for k in KEY): job for job in PHASES[phase](args, [*rows.values()])}
        new = [job | where for key, job in jobs.items() if key not in rows]
        sound &= make_rows(new, bench.run, args.out, args.processes, left)
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
