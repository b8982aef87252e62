"""Peak memory and time of a streamed run of a 1 B parameter Llama, beside what opening and what
loading it take, and beside a run that reads and writes in turn with its work.

Every measurement is a process of its own. The weights are random, bf16 on disk; half precision
computes in float32 on a CPU. The 2.2 GB folder is made for the run and removed after it.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from page import environment, write
from transformers import AutoConfig, AutoModelForCausalLM

from prunekit.checkpoint import LayerWriter, load_tokenizer
from prunekit.demo import DEMO_MODEL

CONFIG = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
MIB = 2**20
OPENED = """
import sys, torch, prunekit, prunekit.checkpoint
from prunekit.checkpoint.streamed import Streamed
from prunekit.graph.example import trace_batch
streamed = Streamed(sys.argv[1], torch.device("cpu"), None, False)
prunekit.checkpoint.load_tokenizer(sys.argv[1])
"""
TRACED = f"""{OPENED}
batch = {{"input_ids": torch.zeros(2, 8, dtype=int)}}
trace_batch(streamed.model, batch)
"""
LOADED = """
import sys, prunekit
from prunekit.model.weights import check_finite
check_finite(prunekit.from_pretrained(sys.argv[1]))
"""
# The same command, but that each piece of reading and writing ends before the work goes on.
IN_TURN = """
from prunekit.cli import main
from prunekit.runtime.background import Background
begin = Background.begin
def begin_and_wait(self, work):
    begin(self, work)
    self._piece[1].exception()
Background.begin = begin_and_wait
main()
"""
BESIDE = {"opened": OPENED, "traced": TRACED, "loaded": LOADED}
NOTE = (
    "Peak resident memory, MiB; the three processes beside it are medians of three. Opened: "
    "prunekit imported, the skeleton without weights, the tokenizer; traced: its groups found too; "
    "loaded: every weight in memory as it is stored, and no pruning. Streamed: the command, from "
    "start to the finished folder; activations wait in memory up to the budget, the rest in files. "
    "In turn: the same command, but that nothing is read or written beside the work."
)


def make(folder: Path, layers: int) -> int:
    """Write a model layer by layer; the bytes of its weights."""
    config = AutoConfig.for_model("llama", **CONFIG | {"num_hidden_layers": layers})
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    writer = LayerWriter(folder, torch.bfloat16)
    torch.manual_seed(0)
    parts: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        key = ".".join(name.split(".")[:3])
        parts.setdefault(key, {})[name] = parameter
    for key, found in parts.items():
        writer.write(
            key,
            {
                n: torch.ones(p.shape) if "norm" in n else torch.randn(p.shape) * 0.02
                for n, p in found.items()
            },
        )
    writer.finish(model, load_tokenizer(DEMO_MODEL))
    return sum(2 * parameter.numel() for parameter in model.parameters())


def measured(*command: str) -> dict[str, float]:
    """Peak resident MiB and CPU seconds of a command; the run itself sets its peak back at every
    stage: polled.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    peak, status = 0.0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines()
        peak = max(
            [peak, *(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))]
        )
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "peak": peak,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--budget", type=int, default=64, help="MiB of activations")
    parser.add_argument("--samples", type=int, default=64, help="of 128 tokens")
    parser.add_argument(
        "--folder", type=Path, help="for the model and the result; a temporary one by default"
    )
    args = parser.parse_args()
    options = [
        "memory.stream=true",
        f"memory.budget={args.budget * MIB}",
        "method=slimgpt",
        "ratio=0.2",
        "eval=none",
    ]
    options += [
        "compensation.target=pruned"
    ]  # SlimGPT's; a target beyond takes a second Hessian and stream
    options += [f"data.calibration.samples={args.samples}", "data.calibration.sequence_length=128"]
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model, pruned = f"{folder}/dense", Path(folder, "pruned")
        num_bytes = make(Path(model), args.layers)
        runs = {
            name: [measured(sys.executable, "-c", code, model) for _ in range(3)]
            for name, code in BESIDE.items()
        }
        where = [f"model.path={model}", f"output_dir={pruned}"]
        in_turn = measured(sys.executable, "-c", IN_TURN, *where, *options)
        before = json.loads((pruned / "report.json").read_text())
        shutil.rmtree(pruned)
        streamed = measured(sys.executable, "-m", "prunekit", *where, *options)
        report = json.loads((pruned / "report.json").read_text())
    result = {
        **environment("streamed"),
        "command": " ".join(["python benchmarks/streamed.py", *sys.argv[1:]]),
    }
    result |= {
        "setup": CONFIG | {"num_hidden_layers": args.layers},
        "options": options,
        "note": NOTE,
    }
    result |= {"weights": num_bytes / MIB, "budget": args.budget, "repeats": 1, **streamed}
    result |= {
        name: statistics.median(run["peak"] for run in found) for name, found in runs.items()
    }
    result["beside"] = {
        "command": result["command"],
        "revision": result["revision"],
        "layers": args.layers,
        "now": {**streamed, "seconds": report["seconds"]["prune"]},
        "in_turn": {**in_turn, "seconds": before["seconds"]["prune"]},
    }
    result["stages"] = {name: peak / MIB for name, peak in report["peak_memory_bytes"].items()}
    result["seconds"], result["versions"] = report["seconds"], report["versions"]
    write("streamed", result)


if __name__ == "__main__":
    main()
