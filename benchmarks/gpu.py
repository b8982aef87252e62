"""What a GPU makes of prunekit: one JSON line a figure, on an H100 within 8 minutes.

    python benchmarks/gpu.py > figures.jsonl          # everything
    python benchmarks/gpu.py --only pruned streamed   # some parts
    python benchmarks/gpu.py --small                  # everything in small, on a CPU

It needs no download: weights and tokens are random, but for those of the embedded model and the
embedded text. A part that fails leaves a line with its error, the others go on, and the exit status
is 1. A part that takes longer than its limit fails.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import gpu_parts
import gpu_search
import torch
from gpu_parts import FULL, SMALL, Sizes
from page import environment

from prunekit.errors import first_line
from prunekit.runtime.memory import free_cached, reset_peak
from prunekit.runtime.versions import versions

TOTAL = 480.0  # seconds of all parts together


@dataclass(frozen=True)
class Part:
    """A function that measures, the seconds it may take, and what it measures."""

    run: Callable[["Bench"], None]
    limit: float
    about: str


PARTS = {
    "pruned": Part(gpu_parts.pruned, 100, "prune with target=pruned, by stage"),
    "residual": Part(gpu_parts.residual, 130, "prune with the default target, by stage"),
    "more_samples": Part(
        gpu_parts.more_samples, 90, "prune with target=pruned, 256 × 2,048 tokens"
    ),
    "streamed": Part(gpu_parts.streamed, 90, "from disk layer by layer against the whole model"),
    "prefill": Part(gpu_parts.prefill, 100, "prefill of free, aligned and default widths"),
    "rounding": Part(gpu_parts.rounding, 30, "a model that amplifies rounding passes its check"),
    "embedded": Part(gpu_parts.embedded, 60, "the embedded model on the device and on the CPU"),
    "llm_pruner": Part(gpu_parts.llm_pruner, 45, "method=llm_pruner, 10 × 128 tokens"),
    "scoring": Part(gpu_parts.scoring, 120, "importance from gradients and from ablation"),
    "magnitude": Part(gpu_parts.magnitude, 30, "method=magnitude"),
    "decode": Part(gpu_parts.decode, 90, "decoding with a static cache under torch.compile"),
    "search": Part(gpu_search.search, 120, "policy=search on a few layers, and the plan for all"),
    "lora": Part(gpu_parts.lora, 60, "recovery=lora, 50 steps"),
    "start_up": Part(gpu_parts.start_up, 120, "the command line on the embedded model"),
}


class OutOfTime(BaseException):
    """A part has taken longer than it may; no `except Exception` on the way catches it."""


@dataclass
class Bench:
    """Where parts run, how large they are, and where their figures go.

    `common`: the fields that every line of this run has.
    """

    device: torch.device
    sizes: Sizes
    common: dict[str, Any] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)  # the figures so far, by name

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        measured: str,
        repeats: int = 1,
        device: torch.device | None = None,
        **more: Any,
    ) -> None:
        """Print the line of a figure; `device`: the one it was measured on, this run's if None."""
        self.values[name] = value
        line = {"name": name, "value": round(value, 4), "unit": unit, "measured": measured, **more}
        self._print({**line, "repeats": repeats, "device": name_of(device or self.device)})

    def failure(self, name: str, error: BaseException) -> None:
        """Print the line of a part that failed."""
        text = f"{type(error).__name__}: {first_line(error)}"
        self._print({"name": name, "error": text, "device": name_of(self.device)})

    def _print(self, line: dict[str, Any]) -> None:
        print(json.dumps({**line, **self.common}, ensure_ascii=False), flush=True)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def common_fields(arguments: Sequence[str]) -> dict[str, Any]:
    """The command, the git revision and the versions of a run."""
    known = versions() | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
    command = " ".join(["python benchmarks/gpu.py", *arguments])
    return {
        "command": command,
        "revision": environment("gpu")["revision"],
        "versions": known,
    }


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in a `with` block that takes longer than so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(name: str, part: Part, bench: Bench, seconds: float) -> bool:
    """Run a part for at most so many seconds; whether it came to its end."""
    reset_peak(bench.device)
    began = time.perf_counter()
    try:
        with limited(seconds):
            part.run(bench)
        succeeded = True
    except (Exception, OutOfTime) as error:
        bench.failure(name, error)
        succeeded = False
    free_cached()
    took = time.perf_counter() - began
    bench.figure(f"{name}.total", took, "s", part.about, limit=round(seconds, 1))
    return succeeded


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="everything in small, on a CPU")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.only if name not in PARTS]:
        parser.error(f"--only: unknown {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    if not args.small and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, and there is none here; --small runs on a CPU")
    device = torch.device("cpu" if args.small else "cuda")
    bench = Bench(device, SMALL if args.small else FULL, common_fields(arguments))
    left, succeeded = TOTAL, True
    for name in dict.fromkeys(args.only):
        began = time.perf_counter()
        limit = PARTS[name].limit if args.small else min(PARTS[name].limit, left)
        succeeded &= run_part(name, PARTS[name], bench, limit)
        left -= time.perf_counter() - began
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
