"""What scoring costs beside one forward and backward pass over the same tokens, which makes all
weights' gradients.

Seconds: CPU time of one thread, ratios in one process, medians of five. Memory: the peak of one
process of its own, above what it held before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from page import environment, write
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.importance import LoraGradient, Magnitude, TaylorFirst, TaylorMixed, TaylorSecond

torch.set_num_threads(1)  # CPU time of one thread: other processes hardly disturb it
REPEATS, BATCHES, SHAPE = 5, 2, (4, 128)
CONFIG = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 4096}
SCORES = {
    "taylor_first": TaylorFirst(),
    "taylor_first, checkpointing": TaylorFirst(checkpointing=True),
    "taylor_second": TaylorSecond(),
    "taylor_mixed": TaylorMixed(),
    "lora_gradient": LoraGradient(),
    "lora_gradient, checkpointing": LoraGradient(checkpointing=True),
    "magnitude": Magnitude(),
}
NOTE = (
    "Every group of attention heads and of FFN channels is scored. A forward and backward pass "
    "adds the gradients of all the model's weights up in `.grad`, as training does; a forward pass "
    "keeps nothing. Memory: above the model."
)


def make() -> tuple[nn.Module, list[dict]]:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **CONFIG, **heads)
    ).eval()
    ids = torch.randint(CONFIG["vocab_size"], (BATCHES, *SHAPE))
    return model, [{"input_ids": rows, "use_cache": False} for rows in ids]


def forward(model: nn.Module, batches: list[dict]) -> None:
    with torch.no_grad():
        for batch in batches:
            loss(model, batch)


def forward_backward(model: nn.Module, batches: list[dict]) -> None:
    for batch in batches:
        loss(model, batch).backward()
    model.zero_grad(set_to_none=True)


def loss(model: nn.Module, batch: dict) -> torch.Tensor:
    logits = model(**batch).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def tasks(model: nn.Module, batches: list[dict]) -> dict:
    graph = prunekit.trace(model, batches[0])
    groups = [group for group in graph.groups if group.kind in ("attention", "mlp")]
    found = {
        "forward": lambda: forward(model, batches),
        "forward_backward": lambda: forward_backward(model, batches),
    }
    for name, importance in SCORES.items():
        found[name] = lambda importance=importance: importance.score(model, graph, groups, batches)
    return found


def seconds() -> dict[str, list[float]]:
    """Name → seconds of each repeat; the first round warms up."""
    todo = tasks(*make())
    took: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(REPEATS + 1):
        for name, task in todo.items():
            began = time.process_time()
            task()
            took[name].append(time.process_time() - began)
    return {name: times[1:] for name, times in took.items()}


def peak(name: str) -> float:
    """Megabytes that a task takes at its peak above what the process held before; in a process of
    its own.
    """
    model, batches = make()
    task = tasks(model, batches)[name]
    forward(
        model, [{"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False}]
    )  # libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    task()
    return status("VmHWM") - before


def status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def in_process(name: str) -> float:
    command = [sys.executable, __file__, "--peak", name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak")
    if name := parser.parse_args().peak:
        print(json.dumps(peak(name)))
        return
    took = seconds()

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(took[name], took[base], strict=True))

    rows = [
        {
            "name": name,
            "seconds": statistics.median(times),
            "to_forward_backward": ratio(name, "forward_backward"),
            "to_forward": ratio(name, "forward"),
            "peak_mb": in_process(name),
        }
        for name, times in took.items()
    ]
    model = make()[0]
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    setup = {**CONFIG, "batches": BATCHES, "batch": SHAPE, "weights_mb": weights}
    write(
        "importance",
        {
            **environment("importance"),
            "repeats": REPEATS,
            "setup": setup,
            "note": NOTE,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
