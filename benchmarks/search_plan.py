"""What `policy=search` takes, worked out for models of any size: bytes, candidates, seconds.

    python benchmarks/search_plan.py

Nothing is searched: models lie on the meta device, levels are the search's own. Seconds are those
of the parts that were measured on an H100 (docs/gpu.md), times how often a search does them.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

import torch
from page import environment, write
from transformers import AutoConfig, AutoModelForCausalLM

from prunekit.allocation.costs.weights import weights_cost
from prunekit.calibration.store import Store
from prunekit.compensation import Obs as Repair
from prunekit.demo import DEMO_MODEL
from prunekit.graph import trace
from prunekit.importance import Obs
from prunekit.policies import LogIncrease, Setting
from prunekit.search import Search
from prunekit.search.bench import LARGEST, make_budget
from prunekit.search.bench import Bench as SearchBench
from prunekit.search.database import Database
from prunekit.search.guide import TOGETHER, count_hopeful
from prunekit.search.levels import Candidate, Space
from prunekit.search.seeds import pick_levels

RATIO = 0.2
CUT_SECONDS = 36.4  # LLaMA-7B's shape, 128 × 2,048 tokens, 20 %: the schedule alone
CUT_WORK = 12.2  # of these, choice and repair
TOKENS_A_SECOND = 2 * 128 * 2048 / 19.3  # two streams through all layers, in the same run
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Shape:
    """A configuration; bytes of a weight; the samples that calibrate, and their length."""

    config: Any
    itemsize: int
    samples: int
    length: int


SHAPES = {
    "embedded": Shape(AutoConfig.from_pretrained(DEMO_MODEL), 4, 128, 128),
    "SmolLM2-135M": Shape(AutoConfig.for_model("llama", **SMOLLM2), 4, 64, 128),
    "LLaMA-7B": Shape(AutoConfig.for_model("llama", **LLAMA), 2, 128, 2048),
}


def plan(shape: Shape, policy: Search) -> dict[str, Any]:
    """The bytes of a search's databases, its candidates, and the tokens that these take."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            shape.config, dtype=torch.bfloat16 if shape.itemsize == 2 else torch.float32
        )
    graph = trace(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")})
    groups = [group for group in graph.groups if group.kind in ("attention", "mlp")]
    cost = weights_cost(graph)
    setting = Setting(
        model=model,
        graph=graph,
        groups=groups,
        batches=[],
        importance=Obs(),
        cost=cost,
        limit=(1 - RATIO) * cost({}),
        compensation=Repair(),
        layerwise=True,
    )
    bench = SearchBench(
        setting=setting,
        budget=make_budget(setting, dict.fromkeys((g.name for g in groups), 1.0)),
        builder=cast(Any, None),
        database=Database(model, groups, Store("meta", budget=0)),
        judge=cast(Any, None),
        checker=cast(Any, None),
    )
    centre = make_budget(setting, LogIncrease().group_shares(setting)).solve()
    rounds = [
        plan_round(bench, shape, policy, centre, number) for number in range(1, policy.rounds + 1)
    ]
    weights = sum(p.numel() for p in model.parameters()) * shape.itemsize
    return {
        "weights": weights,
        "bytes": [each["bytes"] for each in rounds],
        "share": max(each["bytes"] for each in rounds) / weights,
        "candidates": sum(each["candidates"] for each in rounds),
        "tokens": sum(each["tokens"] for each in rounds),
        "cuts": len(policy.seeds) - 1 + 2 * policy.rounds,
    }


def plan_round(
    bench: SearchBench, shape: Shape, policy: Search, centre: dict[str, int], number: int
) -> dict[str, float]:
    """A round at most: a candidate runs half of the layers where one slot of it was moved."""
    step = policy.step / 2 ** (number - 1)
    reach = 1.0 if number == 1 else step * policy.levels / 2
    space = bench.plan_levels(centre, step, reach)
    few, many = (count_tokens(tokens, shape, policy) for tokens in policy.tokens)
    calls = count_candidates(space, policy, bench.steps_of(centre), number)
    tokens = (calls["prices"] + calls["alone"]) * few / 2 + calls["probes"] * many / 2
    tokens += (calls["starts"] + calls["steps"]) * many + calls["children"] * few
    tokens += policy.generations * policy.survivors[0] * (many - few)
    return {
        "bytes": bench.database.count_bytes(space.counts_by_group()),
        "candidates": sum(calls.values()),
        "tokens": tokens,
    }


def count_candidates(
    space: Space, policy: Search, centre: Candidate, number: int
) -> dict[str, int]:
    """How many candidates a round judges at most, by what they are for."""
    slots = len(space.slots)
    priced = [
        {*pick_levels(slot, levels, policy.prices)} - {own}
        for slot, levels, own in zip(space.slots, space.levels, centre, strict=True)
    ]
    return {
        "starts": len(policy.seeds),
        "prices": sum(map(len, priced)),
        "probes": policy.sweeps * 2 * min(count_hopeful(slots), slots),
        "steps": policy.sweeps * (sum(n <= slots for n in TOGETHER) + 1),
        "children": policy.generations * policy.children,
        "alone": slots if number == policy.rounds else 0,
    }


def count_tokens(tokens: int, shape: Shape, policy: Search) -> int:
    """How many tokens a stage takes: whole samples, as many as there are."""
    samples = max(1, round(policy.fitness * shape.samples))
    return min(-(-tokens // shape.length), samples) * shape.length


def estimate_seconds(found: dict[str, Any]) -> dict[str, float]:
    """Seconds of a search of LLaMA-7B's shape, by the parts that were measured.

    A database is a cut whose choice goes on to the last unit and whose repair is made at each
    level: as much of both as `levels` cuts by 20 % at most.
    """
    policy = Search()
    levels = round(1 / policy.step)
    return {
        "cuts": found["cuts"] * CUT_SECONDS,
        "databases": policy.rounds * (CUT_SECONDS + (levels - 1) * CUT_WORK),
        "candidates": found["tokens"] / TOKENS_A_SECOND,
    }


def main() -> None:
    """Plan a search of each shape, by the defaults."""
    plans = {name: plan(shape, Search()) for name, shape in SHAPES.items()}
    plans["LLaMA-7B"]["seconds"] = estimate_seconds(plans["LLaMA-7B"])
    result = {**environment("search_plan"), "repeats": 1, "largest": LARGEST, "plans": plans}
    write("search_plan", result)
    print(json.dumps(plans, indent=1))


if __name__ == "__main__":
    main()
