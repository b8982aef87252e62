"""The layer-wise run against its floor: one forward pass over the calibration tokens, and the
Hessian products.

CPU seconds of one thread; run and floor by turns in one process, a ratio for each turn, medians.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from page import environment, write
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.calibration.moments import Moments
from prunekit.schedules import Layerwise, repair

BATCH = 16
NOTE = (
    "Floor: the decoder layers once over all batches in a plain loop, and x.T @ x of what every "
    "o_proj and down_proj is fed. Layer-wise: the schedule of `prune`, from the embeddings to the "
    "last repaired layer; prune: with tracing, allocation and the checked cut as well. Forward is "
    "what is neither products nor solver. target=residual, the default, takes a dense stream "
    "through the layers beside the pruned one, and products of errors with inputs; the floor is "
    "that of target=pruned, SlimGPT's."
)


def make(config: dict, shape: tuple[int, int]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).eval()
    return model, torch.randint(config["vocab_size"], shape)


@torch.no_grad()
def floor(model: Any, ids: Tensor) -> dict[str, float]:
    """Seconds of the forward pass and of the products."""
    spent = {"products": 0.0}
    sums: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        began = time.process_time()
        x = args[0].flatten(0, -2)
        sums[module] = x.T @ x if module not in sums else sums[module].addmm_(x.T, x)
        spent["products"] += time.process_time() - began

    consumers = [
        m for layer in model.model.layers for m in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    hooks = [module.register_forward_pre_hook(see) for module in consumers]
    began = time.process_time()
    for rows in ids.split(BATCH):
        model.model(input_ids=rows, use_cache=False)
    spent["run"] = time.process_time() - began
    for hook in hooks:
        hook.remove()
    return spent | {"forward": spent["run"] - spent["products"]}


def layerwise(model: nn.Module, ids: Tensor, target: str) -> dict[str, float]:
    """Seconds of a whole `prune`, its schedule, and the parts of that."""
    spent = dict.fromkeys(("run", "products", "solver"), 0.0)
    with ExitStack() as stack:
        for owner, name, key in (
            (Moments, "add", "products"),
            (repair, "cut_group", "solver"),
            (Layerwise, "run", "run"),
        ):
            stack.enter_context(timed(owner, name, spent, key))
        began = time.process_time()
        options = [f"data.calibration.batch_size={BATCH}", f"compensation.target={target}"]
        prunekit.prune(model, ratio=0.2, calibration=ids, overrides=options)
        spent["whole"] = time.process_time() - began
    return spent | {"forward": spent["run"] - spent["products"] - spent["solver"]}


@contextmanager
def timed(
    owner: Any,
    name: str,
    spent: dict[str, float],
    key: str,
    clock: Callable[[], float] = time.process_time,
) -> Iterator[None]:
    """Add what a function takes to `spent`."""
    function: Callable[..., Any] = getattr(owner, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        began = clock()
        try:
            return function(*args, **kwargs)
        finally:
            spent[key] += clock() - began

    with patch.object(owner, name, clocked):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(32, 512), help="sequences and their length"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)  # CPU time of one thread: other processes hardly disturb it
    heads = {"num_attention_heads": args.hidden // 128, "num_key_value_heads": args.hidden // 128}
    sizes = {
        "hidden_size": args.hidden,
        "intermediate_size": args.intermediate,
        "num_hidden_layers": args.layers,
    }
    dense, ids = make({**sizes, **heads, "vocab_size": 2000}, tuple(args.tokens))
    turns: list[tuple[dict, dict, dict]] = []
    floor(dense, ids[:BATCH])  # warms up
    for _ in range(args.repeats):
        runs = (layerwise(copy.deepcopy(dense), ids, target) for target in ("pruned", "residual"))
        turns.append((floor(dense, ids), *runs))
        print(turns[-1], file=sys.stderr)
    bottoms, *runs = zip(*turns, strict=True)
    result = {
        **environment("layerwise"),
        "command": " ".join(["python benchmarks/layerwise.py", *sys.argv[1:]]),
    }
    result |= {
        "repeats": args.repeats,
        "setup": {**sizes, "tokens": list(args.tokens)},
        "note": NOTE,
    }
    result["floor"] = {key: statistics.median(turn[key] for turn in bottoms) for key in bottoms[0]}
    for name, found in zip(("pruned", "residual"), runs, strict=True):
        result[name] = {key: statistics.median(turn[key] for turn in found) for key in found[0]}
        for key in ("run", "whole"):
            ratios = (run[key] / low["run"] for low, run in zip(bottoms, found, strict=True))
            result[name][f"{key}_to_floor"] = statistics.median(ratios)
    write("layerwise", result)


if __name__ == "__main__":
    main()
