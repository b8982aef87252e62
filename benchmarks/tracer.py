"""What tracing costs on LLaMA's shapes, and whose groups are right, beside torch-pruning's tracer
in the same run.

Costs: every measurement is a process of its own (`tracer.py measure …`), on the meta device, both
tools with the same inputs. Verdicts: a unit is cut by each tool's group from a small random model;
right is what equals the dense model with the consumers' columns of that unit zeroed by hand.
"""

import argparse
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch_pruning
from page import environment, write
from torch import nn
from torch.nn import functional
from torch_pruning.dependency import Group
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit

warnings.simplefilter("ignore")
REPEATS = 3
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
COSTS = [  # model, shape, layers, repeats
    *(
        ("LLaMA-7B" if n == 32 else f"LLaMA-7B, {n} layers", LLAMA_7B, n, REPEATS)
        for n in (8, 16, 32, 64)
    ),
    ("LLaMA-70B", LLAMA_70B, 80, 1),
]
COSTS_NOTE = (
    "From a model on the meta device to its groups; 2 × 8 tokens, with position ids and a 4-D "
    "attention mask given, without which torch-pruning's pass through the model stops on the meta "
    "device. prunekit's time is `trace`, groups included; torch-pruning's is `build_dependency`, "
    "then `get_all_groups`; the ratio is of the two sums. MB: the process's peak resident memory, "
    "of which {imports:.0f} MB are imports and the model, before tracing."
)
VERDICTS_NOTE = (
    "One unit (of experts' channels four, as their kernel wants) is cut from a random model with "
    "one layer. Right: the outputs equal, to 1e-4 of their size, the dense model's with that "
    "unit's consumer columns zeroed; wrong by x: they differ by x of their size. torch-pruning is "
    "given all of the unit's positions in one layer as the root of `get_pruning_group`; where it "
    "matters which layer, they are named. Head counts that modules or the config keep are set for "
    "it as prunekit's surgery sets them. Never ends: the search was given up at two thousand "
    "entries, its channel numbers growing beyond any layer's."
)


def llama(shape: dict, layers: int, device: str = "meta") -> nn.Module:
    config = AutoConfig.for_model("llama", vocab_size=32000, num_hidden_layers=layers, **shape)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval()


def measure(tool: str, shape: dict, layers: int) -> dict[str, float]:
    """Seconds, and megabytes of this process at its peak; run in a process of its own."""
    model = llama(shape, layers)
    inputs = {
        "input_ids": torch.zeros(2, 8, dtype=torch.long, device="meta"),
        "position_ids": torch.zeros(2, 8, dtype=torch.long, device="meta"),
        "attention_mask": torch.zeros(2, 1, 8, 8, device="meta"),
        "use_cache": False,
    }
    result = {"imports_mb": peak()}
    began = time.perf_counter()
    if tool == "prunekit":
        result["groups"] = len(prunekit.trace(model, inputs).groups)
        return {**result, "seconds": time.perf_counter() - began, "peak_mb": peak()}
    graph = dependencies(model, inputs)
    result["build_seconds"] = time.perf_counter() - began
    result["groups"] = sum(1 for _ in graph.get_all_groups(root_module_types=[nn.Linear]))
    result["groups_seconds"] = time.perf_counter() - began - result["build_seconds"]
    return {**result, "peak_mb": peak()}


def peak() -> float:
    """This process's peak resident memory in MB; `getrusage` would start from its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def dependencies(model: nn.Module, inputs) -> torch_pruning.DependencyGraph:
    graph = torch_pruning.DependencyGraph()
    return graph.build_dependency(
        model, inputs, verbose=False, output_transform=lambda o: getattr(o, "logits", o)
    )


def costs() -> list[dict]:
    rows = []
    for model, shape, layers, repeats in COSTS:
        runs: dict[str, list[dict]] = {"prunekit": [], "torch_pruning": []}
        for tool in [*runs] * repeats:  # by turns
            command = [sys.executable, __file__, "measure", tool, json.dumps(shape), str(layers)]
            runs[tool].append(
                json.loads(
                    subprocess.check_output(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
                )
            )
        row = {"model": model, "layers": layers, "repeats": repeats}
        for tool, measured in runs.items():
            row[tool] = {
                key: round(statistics.median(run[key] for run in measured), 3)
                for key in measured[0]
            }
        print(row, file=sys.stderr)
        rows.append(row)
    return rows


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.outer, self.head = nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.outer(self.inner_norm(self.inner(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


class ViT(nn.Module):
    """One block; q, k and v of one Linear, taken apart by `unbind`, as most ViTs do it, or by
    `chunk`.
    """

    def __init__(self, apart: str):
        super().__init__()
        self.patch, self.position = (
            nn.Conv2d(3, 48, 4, stride=4),
            nn.Parameter(torch.zeros(1, 4, 48)),
        )
        self.norm1, self.qkv, self.proj = nn.LayerNorm(48), nn.Linear(48, 144), nn.Linear(48, 48)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(48), nn.Linear(48, 40), nn.Linear(40, 48)
        self.head, self.apart = nn.Linear(48, 5), apart

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        qkv = self.qkv(self.norm1(x))
        if self.apart == "unbind":
            q, k, v = qkv.unflatten(-1, (3, -1, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (part.unflatten(-1, (-1, 6)).transpose(1, 2) for part in qkv.chunk(3, -1))
        x = x + self.proj(
            functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return self.head((x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))).mean(1))


def causal(family: str, attention: str = "sdpa", **config) -> nn.Module:
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
    }
    tokens = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **sizes | tokens | config)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def llama_like(family: str, kv_heads: int, attention: str, heads: int = 8):
    sizes = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "hidden_size": 6 * heads,
    }
    return lambda: causal(family, attention, **sizes)


RATIOS = [(kv_heads, attention) for kv_heads in (8, 4, 2, 1) for attention in ("sdpa", "eager")]
CASES = [  # model, how it is built, the kind of group
    (
        "MLP",
        lambda: nn.Sequential(
            nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3)
        ),
        "mlp",
    ),
    ("ResNet-like, batch norm", ResNet, "channel"),
    ("ViT, fused q k v, unbind", lambda: ViT("unbind"), "attention"),
    ("ViT, fused q k v, chunk", lambda: ViT("chunk"), "attention"),
    *(
        (f"Llama 8:{kv}, {attention}", llama_like("llama", kv, attention), "attention")
        for kv, attention in RATIOS
    ),
    ("Llama 64:8, sdpa (LLaMA-70B's)", llama_like("llama", 8, "sdpa", 64), "attention"),
    ("Llama", lambda: causal("llama"), "mlp"),
    *(
        (f"Phi-3 8:{kv}, fused, {attention}", llama_like("phi3", kv, attention), "attention")
        for kv, attention in RATIOS
    ),
    ("Phi-3, fused gate and up", lambda: causal("phi3"), "mlp"),
    ("GPT-2", lambda: causal("gpt2", n_inner=40), "attention"),
    ("GPT-2", lambda: causal("gpt2", n_inner=40), "mlp"),
    ("GPT-NeoX, interleaved q k v", lambda: causal("gpt_neox"), "attention"),
    ("GPT-NeoX", lambda: causal("gpt_neox"), "mlp"),
    ("Mixtral 8:2, sdpa", llama_like("mixtral", 2, "sdpa"), "attention"),
    ("Mixtral, experts' channels", lambda: causal("mixtral", num_local_experts=4), "mlp"),
]


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_(0, 0.2)
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def inputs_of(model: nn.Module):
    if hasattr(model, "config"):
        tokens = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(1))
        return {"input_ids": tokens, "use_cache": False}
    return (torch.randn(4, 6),) if isinstance(model, nn.Sequential) else (torch.randn(2, 3, 8, 8),)


@torch.no_grad()
def outputs(model: nn.Module, inputs) -> torch.Tensor:
    result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return getattr(result, "logits", result)


class EndlessError(Exception):
    """torch-pruning's search for a group that would not end."""


class Bounded(Group):
    """torch-pruning's group, given up at two thousand entries; a layer of these models makes less
    than a hundred.
    """

    def add_dep(self, dep, idxs):
        if len(self) > 2000:
            raise EndlessError
        super().add_dep(dep, idxs)


def verdict(model: str, build, kind: str) -> dict[str, str]:
    dense = randomise(build())
    inputs = inputs_of(dense)
    graph = prunekit.trace(dense, inputs)
    group = next(group for group in graph.groups if group.kind == kind and group.prunable)
    units = [1, 3, 5, 6] if model.startswith("Mixtral") and kind == "mlp" else [0]
    masked = copy.deepcopy(dense)
    for member in group.consumers:
        masked.get_parameter(member.parameter).data.index_fill_(
            member.dim, member.index[units].flatten(), 0
        )
    expected = outputs(masked, inputs)
    ours = copy.deepcopy(dense)
    prunekit.apply_plan(ours, graph, prunekit.PruningPlan({group.name: units}))
    weights = dict(dense.named_parameters())
    found: dict[str, list[str]] = {}
    for member in group.members:
        name = member.parameter
        if name in weights and weights[name].ndim > 1:
            theirs = torch_prunings(copy.deepcopy(dense), inputs, member, units, ours, expected)
            found.setdefault(theirs, []).append(name.removesuffix(".weight").rpartition(".")[2])
    theirs = [
        f"{verdict} ({', '.join(names)})" if len(found) > 1 else verdict
        for verdict, names in found.items()
    ]
    own = judged(error(ours, inputs, expected))
    return {
        "model": model,
        "cut": kind,
        "prunekit": own,
        "torch_pruning": "; ".join(sorted(theirs)),
    }


def torch_prunings(model, inputs, member, units, ours, expected) -> str:
    """The verdict on the group that torch-pruning finds from this member."""
    module = model.get_submodule(member.parameter.rpartition(".")[0])
    try:
        graph = dependencies(model, inputs)
        pruner = graph.get_pruner_of_module(module)
        prune = pruner.prune_in_channels if member.role == "consumer" else pruner.prune_out_channels
        graph.get_pruning_group(module, prune, member.index[units].flatten().tolist()).prune()
        follow(model, ours)
        return judged(error(model, inputs, expected))
    except EndlessError:
        return "never ends"
    except (RuntimeError, ValueError, AssertionError) as problem:
        return (
            "not seen"
            if "not in the dependency graph" in str(problem)
            else f"fails: {type(problem).__name__}"
        )


def follow(model: nn.Module, ours: nn.Module) -> None:
    """Take over the head counts that surgery set in modules and in the config of the one layer."""
    for target, source in zip([*model.modules()], [*ours.modules()], strict=True):
        if "config" in vars(target):
            target.config = source.config
        for name in ("num_heads", "num_key_value_heads", "num_key_value_groups", "split_size"):
            if name in vars(target):
                setattr(target, name, getattr(source, name))


def error(model: nn.Module, inputs, expected: torch.Tensor) -> float:
    return ((outputs(model, inputs) - expected).abs().max() / expected.abs().max()).item()


def judged(difference: float) -> str:
    return "right" if difference < 1e-4 else f"wrong by {difference:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "measure", nargs="*", help="measure TOOL SHAPE LAYERS, in this process alone"
    )
    arguments = parser.parse_args().measure
    if arguments:
        print(json.dumps(measure(arguments[1], json.loads(arguments[2]), int(arguments[3]))))
        return
    torch_pruning.dependency.graph.Group = Bounded
    verdicts = [verdict(*case) for case in CASES]
    rows = costs()
    note = COSTS_NOTE.format(
        imports=statistics.median(row["prunekit"]["imports_mb"] for row in rows)
    )
    result = {
        **environment("tracer"),
        "repeats": REPEATS,
        "torch_pruning": version("torch-pruning"),
    }
    result |= {
        "costs_note": note,
        "costs": rows,
        "verdicts_note": VERDICTS_NOTE,
        "verdicts": verdicts,
    }
    write("tracer", result)


if __name__ == "__main__":
    main()
