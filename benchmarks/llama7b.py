"""LLaMA-7B's shape on a GPU, beside SlimGPT's 678 s and 7,375 MB; without one it says so and leaves
the result alone.

    python benchmarks/llama7b.py                     # an H100, say
    python benchmarks/llama7b.py --device cpu --layers 2 --hidden 256 --length 64 --samples 8  # a
    trial

Random weights are made on the device in bfloat16, random tokens: what it costs, not what it is
worth.
"""

import argparse
import json
import os
import time
from functools import partial
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from layerwise import timed
from page import environment, write
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.calibration.moments import Moments
from prunekit.runtime.memory import peak_memory
from prunekit.schedules import Layerwise
from prunekit.schedules import base as schedules

SIZES = {"layers": 32, "hidden": 4096, "length": 2048}
PAPER = {"seconds": 678, "peak_mb": 7375}  # SlimGPT's, of LLaMA-7B at 20 %
RUNS = (
    (128, None),
    (256, None),
    (128, 0),
)  # samples; bytes of activations on the device, half of what is free if None
NOTE = (
    "Seconds, and the device's peak in MB of 10⁶ allocated bytes. The model lies there whole, so "
    "its weights are in every peak; where activations have no room they wait in pinned host "
    "memory. Schedule: forward, products, solver; whole: `prune` with tracing and the checked cut "
    "as well, which holds dense and cut weights side by side."
)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(args: argparse.Namespace, samples: int, budget: int | None) -> dict:
    """One run on a new model."""
    device, clock, heads = (
        torch.device(args.device),
        partial(now, torch.device(args.device)),
        args.hidden // 128,
    )
    sizes = {
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 43 // 16,
        "num_hidden_layers": args.layers,
    }
    sizes |= {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": args.hidden * 125 // 16,
    }
    config = AutoConfig.for_model("llama", **sizes)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(config.vocab_size, (samples, args.length))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    spent = dict.fromkeys(("products", "solver", "schedule"), 0.0)
    peaks: dict[str, float] = {}
    run = Layerwise.run

    def noted(schedule: Layerwise, task: Any) -> Any:
        plan = run(schedule, task)
        peaks["schedule"] = peak_memory(device) / 1e6
        return plan

    options = [
        "data.calibration.batch_size=4",
        "compensation.target=pruned",
        f"memory.budget={'null' if budget is None else budget}",
    ]
    with (
        patch.object(Layerwise, "run", noted),
        timed(Layerwise, "run", spent, "schedule", clock),
        timed(Moments, "add", spent, "products", clock),
        timed(schedules, "_cut", spent, "solver", clock),
    ):
        began = clock()
        report = prunekit.prune(model, ratio=0.2, calibration=ids, overrides=options).report
        spent["whole"] = clock() - began
    spent |= {
        "forward": spent["schedule"] - spent["products"] - spent["solver"],
        "trace": report["seconds"]["trace"],
    }
    peaks["whole"] = max(report["peak_memory_bytes"].values()) / 1e6
    result = {
        "samples": samples,
        "budget": budget,
        "weights_mb": weights / 1e6,
        "ratio": report["ratio"]["achieved"],
    }
    return {**result, "seconds": spent, "peak_mb": peaks, "versions": report["versions"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial at a small size")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--samples", type=int, help="for a trial: this many, once")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks/llama7b.py: not run: it needs a CUDA GPU, and there is none here")
        return
    runs = RUNS if args.samples is None else ((args.samples, None), (args.samples, 0))
    rows = [measure(args, *run) for run in runs]
    trial = (
        args.device == "cpu"
        or args.samples is not None
        or any(vars(args)[n] != size for n, size in SIZES.items())
    )
    if trial:
        print(json.dumps(rows, indent=1))
        return
    cuda = {
        "device": torch.cuda.get_device_name(args.device),
        "cuda": torch.version.cuda,
        "paper": PAPER,
    }
    write("llama7b", {**environment("llama7b"), **cuda, "repeats": 1, "note": NOTE, "rows": rows})


if __name__ == "__main__":
    main()
