"""Which token weights and which choice cut best: one JSON line a run, from parallel processes.

    python benchmarks/tokens.py --model demo --variants equal relative full
    python benchmarks/tokens.py --model smollm2:FOLDER:C4.jsonl:wiki.test.raw,C4.jsonl \
        --ratios 0.2 0.5 --groups mlp block --seeds 0 1 2 --lengths 128 1024 \
        --workers 12 --device cuda --out tokens.jsonl

A model is `demo`, or name:folder:calibration file:evaluation files. A file that serves both gives
its last fifth of documents to evaluation alone. Nothing is downloaded. Lines are appended as runs
end; runs that the file holds already are left out.
"""

import argparse
import copy
import functools
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from page import environment
from workers import Job, spread

import prunekit
import prunekit.checkpoint
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import calibration_windows, evaluation_windows
from prunekit.demo import DEMO_MODEL
from prunekit.evaluation.perplexity import perplexity

WINDOW = 128  # of the evaluation
HELD_OUT = 5  # a fifth of a file that serves both
BATCH_TOKENS = 2048  # of a forward pass of the calibration set
TOKENS = ("equal", "relative", "clipped", "without_first", "gradient")


def both(tokens: str, *more: str) -> tuple[str, ...]:
    """The options that choose and repair by the same token weights."""
    return (f"importance.tokens={tokens}", f"compensation.tokens={tokens}", *more)


VARIANTS = {
    **{tokens: both(tokens) for tokens in TOKENS},
    **{f"choose {t}": (f"importance.tokens={t}",) for t in TOKENS[1:]},
    **{f"repair {t}": (f"compensation.tokens={t}",) for t in TOKENS[1:]},
    "clipped 0.9": both(
        "clipped", "importance.clip_quantile=0.9", "compensation.clip_quantile=0.9"
    ),
    "without 4": both("without_first", "importance.first_tokens=4", "compensation.first_tokens=4"),
    "diagonal": ("importance.outputs=diagonal",),
    "full": ("importance.outputs=full",),
    "full relative": ("importance.outputs=full", "importance.tokens=relative"),
    "full gradient": ("importance.outputs=full", "importance.tokens=gradient"),
    "full relative both": both("relative", "importance.outputs=full"),
    "full uniform": ("importance.outputs=full", "policy=uniform"),
    "full global": ("importance.outputs=full", "scope=global"),
    "full layer": ("importance.outputs=full", "scope=layer"),
    "peak_to_peak": ("importance=peak_to_peak",),
    "mixed": ("importance=mixed",),
    "wanda": ("importance=wanda", "importance.aggregation=last"),
    "fluctuation": ("importance=fluctuation",),
    "uniform": ("policy=uniform",),
}


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
    """A model, its tokenizer and its texts, loaded once a process."""

    def __init__(self, source: Source, device: str, eval_tokens: int) -> None:
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
            windows = evaluation_windows(held, self.tokenizer, WINDOW, eval_tokens, name)
            self.measured[name] = windows.to(device)

    def measure(self, model: Any) -> dict[str, float]:
        """Perplexity on each text."""
        return {
            name: round(perplexity(model, windows, name=name), 3)
            for name, windows in self.measured.items()
        }


@functools.cache
def load(source: Source, device: str, eval_tokens: int) -> Texts:
    """The texts of a source, the same for all jobs of a process."""
    torch.set_num_threads(1)
    return Texts(source, device, eval_tokens)


def run(job: Job) -> Job:
    """Prune a copy of the model and measure it."""
    texts = load(Source(**job["source"]), job["device"], job["eval_tokens"])
    model = copy.deepcopy(texts.model)
    ids = calibration_windows(
        texts.documents, texts.tokenizer, job["samples"], job["length"], job["seed"]
    )
    options = [f"groups={job['groups']}", *job["overrides"]]
    options += [f"data.calibration.batch_size={max(1, BATCH_TOKENS // job['length'])}"]
    began = time.perf_counter()
    ratio, ids = job["ratio"], ids.to(texts.device)
    result = prunekit.prune(model, ratio=ratio, calibration=ids, overrides=options)
    seconds = time.perf_counter() - began
    removed = Counter()
    for name, units in result.plan.removed.items():
        removed[result.graph[name].kind] += len(units)
    return {
        "perplexity": texts.measure(model),
        "achieved": round(result.report["ratio"]["achieved"], 4),
        "removed": removed,
        "seconds": round(seconds, 1),
    }


def list_jobs(options: argparse.Namespace) -> list[Job]:
    """All runs; those of the first seed come first."""
    return [
        {
            "model": source.name,
            "ratio": ratio,
            "groups": groups,
            "seed": seed,
            "samples": options.samples,
            "length": length,
            "variant": variant,
            "overrides": [*VARIANTS[variant], *options.override],
            "eval_tokens": options.eval_tokens,
            "device": options.device,
            "source": {**asdict(source), "measured": tuple(source.measured)},
        }
        for seed, length, source, ratio, groups, variant in product(
            options.seeds,
            options.lengths,
            options.model,
            options.ratios,
            options.groups,
            options.variants,
        )
    ]


def describe(job: Job) -> Job:
    """What tells a run from others in the file."""
    return {name: value for name, value in job.items() if name != "source"}


def missing(jobs: list[Job], out: Path | None) -> list[Job]:
    """The runs that the file lacks."""
    there = []
    if out is not None and out.exists():
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        there = [line for line in lines if "error" not in line]
    return [job for job in jobs if not any(describe(job).items() <= line.items() for line in there)]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", type=Source.parse, default=[Source.parse("demo")])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2])
    parser.add_argument("--groups", nargs="+", default=["block"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128], help="tokens of a window")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(TOKENS))
    parser.add_argument("--override", nargs="*", default=[], help="options of every run")
    parser.add_argument("--eval-tokens", type=int, default=20_480)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="file that lines are appended to")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Share the runs among processes; the exit status is 1 where one of them failed."""
    options = parse(arguments)
    jobs, failed = missing(list_jobs(options), options.out), False
    where = environment("tokens")
    for job, found in spread(jobs, run, options.workers):
        text = json.dumps({**describe(job), **found, **where})
        failed |= "error" in found
        print(text, flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
