"""The papers' comparisons at small scale: gathers what sweeps of conf/experiment/ left.

python -m prunekit -m experiment=importance hydra.sweep.dir=sweeps/demo/importance
python benchmarks/experiments.py sweeps        # sweeps/<model>/<experiment>/<run>/report.json

A table replaces the one of the same model and experiment in experiments.json; the others stay. Runs
that differ only in data.calibration.seed become a mean and a spread.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from page import HERE, environment, write

NOTES = {
    "importance": "LLM-Pruner's table 1, at 20 %: Taylor (19.09 to 22.28) before random (27.51) "
    "before L2 (582.41), as on stories260K. Contradiction: on the embedded model L2 is before "
    "random. LoRA's rank-8 estimate is no better than random on stories260K at 20 %: with 172 "
    "columns a matrix it is mostly noise.",
    "aggregation": "Its table 7: max is the best for perplexity. Here max and last are before sum, "
    "by less than 2 %.",
    "scope": "Its table 14, at 20 %: local before global on WikiText2 (19.09 and 20.84), global "
    "before local on PTB. Here local is before global too, but for 43.7 % of stories260K; several "
    "rounds of scoring are before local everywhere.",
    "groups": "Its tables 2 and 6: block before channel; without dependencies nothing is left of "
    "the model. Whole layers remove what the nearest number of layers holds, not the ratio asked "
    "for.",
    "depth": "Its window spares the ends; SlimGPT's ramps spare the beginning. Sensitivity is "
    "measured without compensation.",
    "rates": "Its figure 4: L2 collapses at smaller ratios than Taylor. LLM-Pruner's window leaves "
    "no way beyond 48.5 % of stories260K.",
    "layers": "Its figure 3: one layer alone loses 5 % of all parameters; the first layer matters "
    "most. Contradiction: the last doesn't stand out in either model.",
    "whole_layers": "Its table 8 (every other layer). Few layers, so the rows are coarse: the "
    "ratio reached is that of whole layers. Contradiction: Taylor sums over a layer's weights drop "
    "the first layer of stories260K, which it can least do without.",
    "solver": "SlimGPT's table 5, at 50 %: 38.83 (grouped_cholesky, dynamic_group), 39.73 "
    "(fixed_group), 54.94 (diagonal too). Contradiction: diagonal heads cost about 5 % at 50 %, no "
    "more; on stories260K fixed groups of 128 channels, of 172, cost more.",
    "strategies": "SlimGPT's table 6, at 50 %: log increase 38.83, linear increase 46.57, uniform "
    "123.05, log decrease 380.69, linear decrease 932.64: the embedded model's order. "
    "Contradiction: on stories260K, with 5 layers, uniform is as good as log increase, and at 20 % "
    "all five are within 4 %.",
    "calibration": "SlimGPT's figure 3, at 50 %: more sequences and longer ones are better, "
    "without end. Contradiction: beyond 128 sequences more hardly help, and from 32 on, 256 tokens "
    "are worse than 64.",
    "corpora": "SlimGPT's table 14, at 50 %, perplexity on WikiText2: C4 42.06, Alpaca 48.26. Here "
    "on TinyStories, 128 sequences of 128 tokens from local files: the model's own kind of text "
    "first, then C4 before Alpaca as in the paper; embedded is mostly code.",
    "search": "Where to cut: searched by the KL to the dense model, against formulas and measured "
    "shares; two draws of the calibration windows (four fifths of the stories calibrate, the last "
    "fifth is evaluated). At 20 % the search takes its best seed, uniform, since its winner "
    "doesn't lead beyond doubt; at 33 % it does so in one draw of two.",
}
HIDDEN = ("eval.", "ratio=", "data.calibration.seed=", "data.calibration.path=", "experiment=")
BY_LAYER = "policy=log_increase"  # whose ratios by layer are kept: SlimGPT's figure 4


def runs(folder: Path) -> list[dict]:
    reports = sorted(folder.glob("*/report.json"))
    parts = [
        [p for p in yaml.safe_load(path.read_text()) if not p.startswith(HIDDEN)]
        for path in (report.parent / ".hydra" / "overrides.yaml" for report in reports)
    ]
    common = set(parts[0]).intersection(*parts) if parts else set()
    draws = defaultdict(list)
    for path, own in zip(reports, parts, strict=True):
        found = json.loads(path.read_text())
        chosen = ", ".join(
            part.removeprefix("data.calibration.") for part in own if part not in common
        )
        draws[chosen or "the default", found["ratio"]["target"]].append(found)
    rows = []
    for (chosen, target), found in draws.items():
        perplexities = [next(iter(report["perplexity"].values())) for report in found]
        pruned = [perplexity["pruned"] for perplexity in perplexities]
        row = {
            "chosen": chosen,
            "target": target,
            "achieved": found[0]["ratio"]["achieved"],
            "dense": perplexities[0]["dense"],
            "pruned": statistics.mean(pruned),
        }
        if len(pruned) > 1:
            row |= {"spread": statistics.stdev(pruned), "runs": len(pruned)}
        if chosen == BY_LAYER:
            row["removed"] = [removed(layer) for layer in found[0]["layers"]]
        rows.append(row)
    return rows


def removed(layer: dict[str, Any]) -> dict[str, float]:
    """Kind → the share of its units that go."""
    return {
        kind: 1 - units["kept"] / units["total"] for kind, units in layer.items() if kind != "index"
    }


def main() -> None:
    root = Path(sys.argv[1])
    header = {**environment("experiments"), "repeats": 1}
    path = HERE / "experiments.json"
    earlier = json.loads(path.read_text()) if path.exists() else {"tables": []}
    tables = {
        (t["model"], t["experiment"]): {"revision": earlier.get("revision"), **t}
        for t in earlier["tables"]
    }
    for folder in sorted(root.glob("*/*/")):
        model, experiment = folder.parent.name, folder.name
        found = {
            "revision": header["revision"],
            "model": model,
            "experiment": experiment,
            "rows": runs(folder),
        }
        tables[model, experiment] = found
    for (_, experiment), found in tables.items():
        found["note"] = NOTES.get(experiment, "")
    write("experiments", {**header, "tables": [tables[key] for key in sorted(tables)]})


if __name__ == "__main__":
    main()
