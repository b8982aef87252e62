"""Learned gates beside slimgpt and the search, before and after recovery, at equal compute.

python benchmarks/gates.py --runs FILE --model SmolLM2-135M --folder FOLDER --train c4.jsonl \
    --others wiki.test.raw --device cuda --processes 4 --seconds 400 \
    --steps 200 --batch-rows 16 --samples 512 --recovery 1024
python benchmarks/gates.py --runs FILE --model demo --processes 2 --seconds 400
python benchmarks/gates.py --runs FILE --gather

The last fifth of the documents of the training text is held out. Every run prunes the model once,
and recovers it twice by the same LoRA: on `--recovery` rows, and on so many more that all of it
costs what gates and their recovery cost. Compute is counted in tokens that went through all layers,
forward alone or forward and backward. A run leaves a line in the file as soon as it is done; a run
that is there is not made again. The most important runs come first, and after `--seconds` none goes
on. Nothing is downloaded. Gathered rows take the place of those of the same model in gates.json.
"""

import argparse
import copy
import functools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from page import HERE, environment, write
from torch.nn.modules.module import register_module_forward_hook
from workers import Job, make_rows, read_rows

import prunekit
import prunekit.checkpoint
from prunekit import config as cfg
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import calibration_windows, evaluation_windows
from prunekit.demo import DEMO_MODEL
from prunekit.evaluation.perplexity import perplexity
from prunekit.importance.learned import LearnedImportance
from prunekit.model.stack import hidden_of_output
from prunekit.recovery import Recovery, prepare, recover

KEY = ("model", "ratio", "method", "seed")
HELD_OUT = 5  # a fifth of the training text
WINDOW = 128  # of the evaluation
ALONE = ("compensation=none", "schedule=oneshot")
STRAIGHT = ("importance=straight_through",)
# What is asked first stands first: does a learned choice with the repair beat either alone?
CORE = {
    "slimgpt": ("slimgpt",),
    "hard_concrete + obs": ("gates",),
    "straight_through + obs": ("gates", *STRAIGHT),
    "hard_concrete": ("gates", *ALONE),
    "straight_through": ("gates", *STRAIGHT, *ALONE),
}
BALANCED = ("importance.multiplier=balanced",)
CORE |= {"balanced + obs": ("gates", *BALANCED), "balanced": ("gates", *BALANCED, *ALONE)}
TUNED = {"compresso": ("compresso",), "sheared": ("sheared",)}
METHODS = {**CORE, **TUNED, "search": ("slimgpt", "policy=search")}
GATED = tuple(name for name in METHODS if name not in ("slimgpt", "search"))
NOTE = (
    "Where there are fewer than three seeds, no more came to an end. Gates that are trained once "
    "serve the rows with and without the repair (obs); balanced: `importance.multiplier=balanced`. "
    "As pruned, hard-concrete gates with the repair beat slimgpt on SmolLM2-135M, at 50 % by far, "
    "and on text of another kind, too; on the embedded model and on stories260K only at 50 %, and "
    "only on their own kind of text. A longer LoRA after slimgpt is worth more on stories260K and "
    "at 20 % on SmolLM2-135M; at 50 % gates lead there by 2 and 7 %, and on the embedded model, "
    "which recovers little, by 3 %. Without the repair gates are behind slimgpt on text of their "
    "own kind, but for 50 % on SmolLM2-135M. Balanced multipliers are better at 20 % on "
    "stories260K, and not at 50 % with the repair. So none of them is a default. On stories260K "
    "the search costs more than the gates, so that it has no longer recovery. There compresso, "
    "which trains low-rank updates beside the gates, beats all others at 50 % as pruned, on both "
    "texts; a longer LoRA after slimgpt is better on its own kind of text. Rows on a CPU were made "
    "when several studies shared two cores, compresso and sheared too: their seconds are too many."
)


class Compute:
    """Counts tokens that went through all layers: forward alone, or forward and backward.

    Args:
        model: any copy or cut of it is counted, by the class of its layers.
    """

    def __init__(self, model: Any) -> None:
        self.kind = type(model.model.layers[0])
        self.layers = len(model.model.layers)
        self.counts: Counter[str] = Counter()
        self.before = 0.0  # seconds of another run that count for this one
        register_module_forward_hook(self._count)

    def _count(self, module: Any, _: Any, output: Any) -> None:
        hidden = hidden_of_output(output) if type(module) is self.kind else None
        if type(hidden) is torch.Tensor and hidden.device.type != "meta":
            trained = "trained" if torch.is_grad_enabled() else "forward"
            self.counts[trained] += hidden.shape[:-1].numel()

    def add(self, counts: Counter[str], seconds: float) -> None:
        """Count what another run has done for this one."""
        self.counts += counts
        self.before += seconds

    @contextmanager
    def counted(self) -> Iterator[dict[str, float]]:
        """Tokens of a `with` block, and its seconds, once it is left."""
        self.counts.clear()
        self.before = 0.0
        found: dict[str, float] = {}
        began = time.perf_counter()
        yield found
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found["seconds"] = round(time.perf_counter() - began + self.before, 1)
        for name in ("forward", "trained"):
            found[name] = self.counts[name] // self.layers


def units(method: str, compute: dict[str, float]) -> float:
    """Compute in tokens of a forward pass; the backward pass to frozen weights costs as much.

    To weights that are all trained it costs twice as much.
    """
    return compute["forward"] + (3 if method == "sheared" else 2) * compute["trained"]


@contextmanager
def learned_once(name: str, compute: Compute) -> Iterator[None]:
    """Gates that a run of this name has trained are not trained again; their cost is counted.

    The repair changes nothing in them, and the processes share a folder of temporary files.
    """
    path, measure = Path(tempfile.gettempdir(), f"{name}.pt"), LearnedImportance.measure

    def measure_once(self: Any, *args: Any) -> Any:
        if path.exists():
            found, counts, seconds = torch.load(path, weights_only=False)
            compute.add(counts, seconds)
            return found
        before, began = compute.counts.copy(), time.perf_counter()
        found = measure(self, *args)
        kept = (found, compute.counts - before, time.perf_counter() - began)
        half = path.with_suffix(f".{os.getpid()}")
        torch.save(kept, half)
        half.replace(path)
        return found

    LearnedImportance.measure = measure_once
    try:
        yield
    finally:
        LearnedImportance.measure = measure


class Subject:
    """A model with its texts and dense figures, loaded once a process."""

    def __init__(self, folder: str, train: str, others: list[str], device: str, most: int) -> None:
        source = folder or DEMO_MODEL
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.model = prunekit.from_pretrained(source, dtype=dtype).to(device)
        self.tokenizer = prunekit.checkpoint.load_tokenizer(source)
        self.compute = Compute(self.model)
        self.corpora = cfg.check(cfg.compose(["output_dir=none"])).corpora
        self.texts = tempfile.TemporaryDirectory()
        documents = load_corpus(train, "calibration", {})
        if train == "embedded":
            held = load_corpus(train, "eval", {})
        else:
            border = len(documents) - len(documents) // HELD_OUT
            documents, held = documents[:border], documents[border:]
        self.documents, self.trained_on = documents, str(Path(self.texts.name, "train.jsonl"))
        lines = (json.dumps({"text": text}) for text in documents)
        Path(self.trained_on).write_text("\n".join(lines), encoding="utf-8")
        texts = {"held out": held}
        texts |= {Path(file).stem: load_corpus(file, "eval", {}) for file in others}
        self.windows = {
            name: evaluation_windows(text, self.tokenizer, WINDOW, most, name).to(device)
            for name, text in texts.items()
        }
        self.dense = self.measure(self.model)

    def measure(self, model: Any) -> dict[str, float]:
        """Perplexity on each text."""
        return {
            name: round(perplexity(model, windows, 32, name), 4)
            for name, windows in self.windows.items()
        }

    def recover(self, pruned: Any, job: Job, rows: int, updates: Any) -> dict[str, Any]:
        """The same LoRA on so many rows of the training text; figures and compute.

        It goes on from `updates` that stayed beside the gates, if there are any.
        """
        model = copy.deepcopy(pruned)
        settings = {"corpus": self.trained_on, "length": WINDOW, "batch_size": 32, "holdout": 0}
        settings |= {"evaluations": 0, "checkpoints": 0, "learning_rate": job["recovery_rate"]}
        whole = {"known": self.corpora, "seed": job["seed"]}
        data = prepare(model, self.tokenizer, Recovery(**settings), watch=(), **whole)
        recovery = Recovery(**settings, epochs=rows / len(data.training))
        with tempfile.TemporaryDirectory() as folder, self.compute.counted() as compute:
            place = {"folder": Path(folder), "data": data, "updates": updates}
            recover(model, self.tokenizer, recovery, **place, **whole)
        return {"rows": rows, "perplexity": self.measure(model), **compute}


@functools.cache
def load(*options: Any) -> Subject:
    """The subject of all jobs of a process."""
    torch.set_num_threads(1)
    folder, train, others, device, most = options
    return Subject(folder, train, others.split(",") if others else [], device, most)


def run(job: Job) -> Job:
    """Prune a copy of the model, measure it, recover it twice and measure that."""
    folders = json.loads(os.environ["GATES_FOLDERS"])
    subject = load(*folders, job["device"], job["eval_tokens"])
    method, *own = METHODS[job["method"]]
    options = [*own, *job["options"], f"data.calibration.batch_size={job['batch_rows']}"]
    if job["method"] in GATED and not job["method"].startswith("straight"):
        options.append(f"importance.pressure={job['pressure']}")
    if job["method"] in GATED:
        train = {"steps": job["steps"], "batch_size": job["batch_rows"], "seed": job["seed"]}
        options += [f"importance.train.{name}={value}" for name, value in train.items()]
    ids = calibration_windows(
        subject.documents, subject.tokenizer, job["samples"], job["length"], job["seed"]
    )
    model = copy.deepcopy(subject.model)
    calibration = ids.to(job["device"])
    kind = job["method"].partition(" ")[0]
    name = f"{job['model']}-{job['ratio']}-{kind}-{job['seed']}"
    with subject.compute.counted() as compute, learned_once(name, subject.compute):
        result = prunekit.prune(
            model, ratio=job["ratio"], method=method, calibration=calibration, overrides=options
        )
    row = {"achieved": result.report["ratio"]["achieved"], "dense": subject.dense}
    row["pruned"] = {"perplexity": subject.measure(model), **compute}
    row["recovered"] = subject.recover(model, job, job["recovery"], result.updates)
    more = round(job["recovery"] + spare(job, compute))
    same = more < 1.1 * job["recovery"]
    row["equal"] = row["recovered"] if same else subject.recover(model, job, more, result.updates)
    cuda = job["device"].startswith("cuda")
    return {**row, "device_name": torch.cuda.get_device_name() if cuda else "CPU"}


def spare(job: Job, compute: dict[str, float]) -> float:
    """Rows of recovery that a pruning may have in addition, to cost what training gates costs."""
    scored, trained = job["samples"] * job["length"], job["batch_rows"] * job["length"]
    gates = 2 * scored + 3 * job["steps"] * trained  # three: the dense model's logits, too
    return (gates - units(job["method"], compute)) / (2 * WINDOW)


def list_jobs(args: argparse.Namespace, done: Any) -> list[Job]:
    """The runs that are not done, the most important first."""
    common = {
        "options": args.overrides,
        "device": args.device,
        "processes": args.processes,
        "train": Path(args.train).name,
        "others": [Path(file).name for file in args.others],
        **{name: getattr(args, name) for name in SETTINGS},
        "revision": environment("gates")["revision"],
    }
    jobs = [
        dict(zip(KEY, (args.model, ratio, method, seed), strict=True))
        for seed, method, ratio in product(args.seeds, args.methods, args.ratios)
    ]
    first = args.seeds[0]
    jobs.sort(key=lambda job: job["seed"] != first and job["method"] not in CORE)
    return [{**job, **common} for job in jobs if tuple(job.values()) not in done]


SETTINGS = {
    "steps": (200, "updates of the gates"),
    "batch_rows": (4, "rows of a step"),
    "pressure": (5.0, "of hard-concrete gates; with 1, 100 steps left 78 % where 50 were asked"),
    "samples": (128, "calibration windows"),
    "length": (128, "tokens of a window"),
    "recovery": (512, "rows of a recovery, of 128 tokens"),
    "recovery_rate": (5e-4, "its learning rate"),
    "eval_tokens": (32_768, "tokens that perplexity is measured on, of each text"),
}


def gather(path: Path) -> None:
    """Put the rows of a file into gates.json, and bring the page up to date."""
    known = HERE / "gates.json"
    rows = json.loads(known.read_text())["rows"] if known.exists() else []
    merged = {tuple(row[key] for key in KEY): row for row in rows} | read_rows(path, KEY)
    rows = sorted(merged.values(), key=lambda row: list(METHODS).index(row["method"]))
    found = {**environment("gates"), "repeats": 1, "note": NOTE, "rows": rows}
    write("gates", found)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, required=True, help="their file, a JSON object a line")
    parser.add_argument("--gather", action="store_true", help="bring gates.json up to date")
    parser.add_argument("--model", default="demo", help="its name in the table")
    parser.add_argument("--folder", default="", help="its folder; empty: the embedded model")
    parser.add_argument("--train", default="embedded", help="text that is trained on")
    parser.add_argument("--others", nargs="*", default=[], help="more text to evaluate on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="stop after so long; runs so far are kept")
    for name, (value, about) in SETTINGS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help=about)
    parser.add_argument("overrides", nargs="*", help="of the command line, behind --")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Make the runs that were asked for and are not there yet; or gather them."""
    args = parse(arguments)
    if args.gather:
        gather(args.runs)
        return 0
    jobs = list_jobs(args, read_rows(args.runs, KEY))
    folders = [args.folder, args.train, ",".join(args.others)]
    os.environ["GATES_FOLDERS"] = json.dumps(folders)  # no part of the rows
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # what an ended process leaves goes with it
        return int(not make_rows(jobs, run, args.runs, args.processes, args.seconds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
