"""What SlimGPT's choices are worth: layer errors and perplexities over five calibration seeds, mean
and spread.

python benchmarks/quality.py demo                                                     # the embedded
model python benchmarks/quality.py stories260K MODEL_FOLDER TEXT_FILE python benchmarks/quality.py
gpt2 FOLDER_OF_small_gpt2.py python benchmarks/quality.py --gather

Each call leaves benchmarks/quality/<name>.json; the last one makes the table of all of them.
"""

import copy
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
from page import environment, write

import prunekit
import prunekit.checkpoint
from prunekit import config as cfg
from prunekit.calibration.statistics import Statistics
from prunekit.calibration.walk import Walk
from prunekit.data.batches import make_batches
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import calibration_windows, evaluation_windows
from prunekit.demo import DEMO_MODEL
from prunekit.evaluation.perplexity import perplexity
from prunekit.graph import trace
from prunekit.obs.choose import choose_columns, choose_units
from prunekit.obs.inverse import removal_error
from prunekit.obs.swap import swap

NOTE = (
    "Mean ± spread over five draws of the calibration windows. demo: the "
    "embedded model, gpt2: `benchmarks/small_gpt2.py`, both on the standard library's text, "
    "stories260K TinyStories. Layer errors: E(S) / E‖W x‖² on the dense model's inputs, mean over "
    "the layers. target=residual, the default, is the best nearly everywhere, more so with more "
    "tokens; target=dense alone is hardly better than pruned, often worse. refine=swap lowers "
    "every layer's error and hardly the perplexity: not the default. But for the rows on targets, "
    "target=pruned."
)
FOLDER = Path(__file__).parent / "quality"
SEEDS, WINDOW, EVAL_TOKENS = range(5), 128, 16_384
RATIOS, TOKENS = (0.2, 0.45), (8_192, 32_768, 131_072)
HEADS = ("exact", "grouped_cholesky", "diagonal")
COLUMNS = ("greedy", "dynamic_group", "released_group", "fixed_group")
RUNS = [
    *[
        ("target", f"compensation.target={t}", n)
        for n in TOKENS[:2]
        for t in ("pruned", "dense", "residual")
    ],
    *[("heads", f"importance.heads={heads}", TOKENS[0]) for heads in HEADS],
    *[("columns", f"importance.columns={columns}", TOKENS[0]) for columns in COLUMNS],
    *[("refine", f"importance.refine={refine}", TOKENS[0]) for refine in ("none", "swap")],
    *[("target", f"compensation.target={t}", TOKENS[2]) for t in ("pruned", "dense", "residual")],
    ("target by kind", "compensation.attention=residual", TOKENS[1]),
    ("target by kind", "compensation.mlp=residual", TOKENS[1]),
]
DEFAULTS = {
    "importance.heads=exact",
    "importance.columns=greedy",
    "importance.refine=none",
    "compensation.target=pruned",
}


class Setting:
    """A model with its texts."""

    def __init__(self, name: str, folder: str | None = None, text: str | None = None) -> None:
        self.name, source = name, folder or DEMO_MODEL
        corpora = cfg.check(cfg.compose(["output_dir=none"])).corpora
        self.model = prunekit.from_pretrained(source, dtype=torch.float32)
        self.tokenizer = prunekit.checkpoint.load_tokenizer(source)
        self.documents = load_corpus(text or "embedded", "calibration", corpora)
        held = load_corpus(text or "embedded", "eval", corpora)
        self.windows = evaluation_windows(held, self.tokenizer, WINDOW, EVAL_TOKENS, name)

    def calibration(self, tokens: int, seed: int) -> torch.Tensor:
        return calibration_windows(self.documents, self.tokenizer, tokens // WINDOW, WINDOW, seed)

    def perplexity(self, option: str, ratio: float, tokens: int, seed: int) -> float:
        model = copy.deepcopy(self.model)
        prunekit.prune(
            model,
            ratio=ratio,
            calibration=self.calibration(tokens, seed),
            overrides=["compensation.target=pruned", "shapes=free", option],
        )
        return perplexity(model, self.windows, 32, self.name)


def layer_errors(setting: Setting, seed: int) -> dict[str, float]:
    """Mean over the layers of E(S) / E‖W x‖², half of the units removed on the dense model's
    inputs.
    """
    model = copy.deepcopy(setting.model)
    windows = setting.calibration(TOKENS[0], seed)
    graph = trace(model, {"input_ids": windows[:2, :8], "use_cache": False})
    groups = [group for group in graph.groups if group.kind in ("attention", "mlp")]
    found: dict[str, list[float]] = defaultdict(list)
    for group, (site,) in Walk(
        model=model, groups=groups, batches=make_batches(model, windows, 16, torch.device("cpu"))
    ):
        problem = Statistics(site=site, damping=0.0001).problem(site.weight())
        count, energy = group.num_units // 2, site.energy()
        choose, names = (
            (choose_units, HEADS) if group.kind == "attention" else (choose_columns, COLUMNS)
        )
        for name in names:
            units = choose([problem], count, name)
            found[f"{group.kind} {name}"].append(removal_error(problem, units).item() / energy)
            units = swap([problem], units)
            found[f"{group.kind} {name} + swap"].append(
                removal_error(problem, units).item() / energy
            )
    return {name: statistics.mean(values) for name, values in found.items()}


def measure(setting: Setting) -> None:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{setting.name}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    done.setdefault("dense", perplexity(setting.model, setting.windows, 32, setting.name))
    if "layer_error" not in done:
        each = [layer_errors(setting, seed) for seed in SEEDS]
        done["layer_error"] = {name: [row[name] for row in each] for name in each[0]}
        path.write_text(json.dumps(done, indent=1) + "\n")
    found: dict[str, list[float]] = {}
    for question, option, tokens in RUNS:
        for ratio in RATIOS:
            key = f"{question}|{option}|{tokens}|{ratio}"
            if option in DEFAULTS and (same := f"default|{tokens}|{ratio}") in found:
                done[key] = found[same]
            if key not in done:
                done[key] = [setting.perplexity(option, ratio, tokens, seed) for seed in SEEDS]
                path.write_text(json.dumps(done, indent=1) + "\n")
                print(setting.name, key, [round(value, 2) for value in done[key]], flush=True)
            if option in DEFAULTS:
                found[f"default|{tokens}|{ratio}"] = done[key]


def gather() -> None:
    rows = []
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text())
        for name, values in found.pop("layer_error").items():
            question = "layer error, half of the units"
            rows.append(
                {"model": path.stem, "question": question, "setting": name, **_spread(values)}
            )
        found.pop("dense")
        for key, values in found.items():
            question, option, tokens, ratio = key.split("|")
            question = f"{question}, {int(tokens):,} tokens: perplexity at {float(ratio):.0%}"
            rows.append(
                {
                    "model": path.stem,
                    "question": question,
                    "setting": option.partition(".")[2],
                    **_spread(values),
                }
            )
    write("quality", {**environment("quality"), "repeats": len(SEEDS), "note": NOTE, "rows": rows})


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "mean": statistics.mean(values),
        "spread": statistics.stdev(values),
        "runs": len(values),
    }


if __name__ == "__main__":
    gather() if sys.argv[1] == "--gather" else measure(Setting(*sys.argv[1:]))
