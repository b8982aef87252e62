"""The papers' comparisons at small scale: gathers what sweeps of conf/experiment/ left.

python -m prunekit -m experiment=importance hydra.sweep.dir=sweeps/demo/importance
python benchmarks/experiments.py sweeps        # sweeps/<model>/<experiment>/<run>/report.json
"""

import json
import sys
from pathlib import Path

from page import environment, write

NOTES = {
    "importance": "LLM-Pruner's table 1: Taylor before L2 before random. Contradiction: on stories260K L2 is behind "
    "random, and LoRA's rank-8 estimate no better at 20 %: with 172 columns a matrix it is mostly noise.",
    "aggregation": "Its table 7: max is the best for perplexity. Here max and last are before sum, by less than 2 %.",
    "scope": "Its table 14: global before local at 20 %. Contradiction: here local is before global, but for 43.7 % of "
    "stories260K; several rounds of scoring are before local everywhere.",
    "groups": "Its tables 2 and 6: block before channel; without dependencies nothing is left of the model. Whole "
    "layers remove what the nearest number of layers holds, not the ratio asked for.",
    "depth": "Its window spares the ends; SlimGPT's ramps spare the beginning. Sensitivity is measured "
    "without compensation.",
    "rates": "Its figure 4: L2 collapses at smaller ratios than Taylor. LLM-Pruner's window leaves no way beyond "
    "48.5 % of stories260K.",
    "layers": "Its figure 3: one layer alone loses 5 % of all parameters; the first layer matters most. "
    "Contradiction: the last doesn't stand out in either model.",
    "whole_layers": "Its table 8 (every other layer). Few layers, so the rows are coarse: the ratio reached is that of "
    "whole layers. Contradiction: Taylor sums over a layer's weights drop the first layer of stories260K, which it "
    "can least do without.",
}
HIDDEN = ("data.", "eval.", "ratio=")


def runs(folder: Path) -> list[dict]:
    rows = []
    for report in sorted(folder.glob("*/report.json")):
        found = json.loads(report.read_text())
        chosen = [part for part in report.parent.name.split(",") if not part.startswith(HIDDEN)]
        ((_, perplexity),) = found["perplexity"].items()
        rows.append(
            {
                "chosen": ", ".join(chosen) or "the default",
                "target": found["ratio"]["target"],
                "achieved": found["ratio"]["achieved"],
                "dense": perplexity["dense"],
                "pruned": perplexity["pruned"],
            }
        )
    return rows


def main() -> None:
    root = Path(sys.argv[1])
    tables = [
        {"model": model.name, "experiment": folder.name, "note": NOTES.get(folder.name, ""), "rows": runs(folder)}
        for model in sorted(root.iterdir())
        for folder in sorted(model.iterdir())
    ]
    write("experiments", {**environment("experiments"), "repeats": 1, "tables": tables})


if __name__ == "__main__":
    main()
