"""What `policy=search` costs: measured on a few layers, and planned for all of them.

A search's work is of three kinds: databases of levels and exact cuts, a layer-wise walk each, whose
seconds grow with the number of layers; and candidates, whose number grows with the layers, as does
what each of them takes. So the plan holds at most: heads and the embedding are counted per layer.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from gpu_parts import Stopwatch, describe, draw_tokens, make_model

import prunekit
from prunekit.search import Search
from prunekit.search.arena import Arena
from prunekit.search.bench import Bench as SearchBench
from prunekit.search.build import Builder

if TYPE_CHECKING:
    from gpu import Bench

LAYERS = 2  # of the model that is searched
AIM_SECONDS, AIM_BYTES = 900, 1.5
SMALL = ["policy.tokens=[64,128]", "policy.children=4", "policy.generations=1", "policy.sweeps=1"]
KINDS = {
    "databases": (Builder, "fill"),
    "checks": (SearchBench, "check"),
    "candidates": (Arena, "measure"),
}


def search(bench: Bench) -> None:
    """Search a few layers of the shape; seconds by kind of work, and the plan for all layers."""
    sizes, watch = bench.sizes, Stopwatch(bench.device)
    model = make_model(bench, LAYERS)
    weights = sum(
        p.numel() * p.element_size() for layer in model.model.layers for p in layer.parameters()
    )
    options = ["policy=search", f"data.calibration.batch_size={sizes.batch}"]
    options += [] if bench.device.type == "cuda" else SMALL
    ids = draw_tokens(bench, sizes.samples, sizes.length)
    with watch.watching(KINDS):
        report = prunekit.prune(model, ratio=0.2, calibration=ids, overrides=options).report
    found, turns = report["policy"]["search"], watch.seconds()
    what = "ratio=0.2, policy=search"
    measured = describe(bench, sizes.samples, sizes.length, what, LAYERS)
    for kind in KINDS:
        bench.figure(f"search.{kind}", sum(turns[kind]), "s", measured, calls=len(turns[kind]))
    bench.figure("search.evaluations", found["evaluations"], "candidates", measured)
    bench.figure("search.passes", found["passes"], "of the calibration set", measured)

    policy, more = Search(), sizes.layers / LAYERS
    rounds = len(found["rounds"])
    seconds = statistics.mean(turns["databases"]) * policy.rounds * more
    cuts = len(policy.seeds) - 1 + 2 * policy.rounds  # a knapsack and a winner a round
    seconds += statistics.mean(turns["checks"]) * cuts * more
    seconds += sum(turns["candidates"]) * policy.rounds / rounds * more**2
    planned = f"planned for {sizes.layers} layers of {sizes.name} from the parts above"
    evaluations = found["evaluations"] * policy.rounds / rounds * more
    bench.figure("search.planned_evaluations", evaluations, "candidates, at most", planned)
    bench.figure("search.planned", seconds, "s, at most", planned, aim=AIM_SECONDS)
    share = max(each["database_bytes"] for each in found["rounds"]) / weights
    bench.figure("search.database", share, "of the layers' weights", measured, aim=AIM_BYTES)
