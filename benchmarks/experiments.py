"""The papers' comparisons at small scale: gathers what sweeps of conf/experiment/ left.

python -m prunekit -m experiment=importance hydra.sweep.dir=sweeps/demo/importance
python benchmarks/experiments.py sweeps        # sweeps/<model>/<experiment>/<run>/report.json
"""

import json
import sys
from pathlib import Path

from page import environment, write

NOTES: dict[str, str] = {}
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
