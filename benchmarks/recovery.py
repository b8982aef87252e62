"""What recovery gives back after 20 and 45 %, by method and kind; more data, and only some of the
linears.

python benchmarks/recovery.py demo                                    # the embedded model
python benchmarks/recovery.py stories260K MODEL_FOLDER TEXT_FILE      # five sixths of it train, the
rest is held out

Each call replaces its own model's rows in benchmarks/recovery.json.
"""

import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from page import HERE, environment, write

import prunekit
import prunekit.checkpoint
from prunekit import config as cfg
from prunekit.data.corpora import load_corpus, read_file
from prunekit.data.tokens import calibration_windows, evaluation_windows
from prunekit.demo import DEMO_MODEL
from prunekit.evaluation.perplexity import perplexity
from prunekit.recovery import Recovery, recover

NOTE = (
    "Held-out perplexity, one calibration draw, one seed. Rows of 128 tokens of plain text (the "
    "embedded corpus, TinyStories), batches of 16, cosine; LoRA of rank 8 on every linear at 5e-4, "
    "distillation (KL towards the dense model, the same adapters) at 1e-3. Nothing is chosen on "
    "the held-out text."
)
WINDOW = 128
ROWS = {"demo": 400}  # the larger model takes longer; 1,200 elsewhere
KINDS = {
    "lora": {"learning_rate": 5e-4},
    "distill": {"learning_rate": 1e-3, "plain": 0.0, "kl": 1.0},
}


class Setting:
    """A model, its text to train on as a file or "embedded", and its held-out windows."""

    def __init__(self, name: str, folder: str | None = None, text: str | None = None) -> None:
        self.name, source, self.corpus = name, folder or DEMO_MODEL, "embedded"
        self.model = prunekit.from_pretrained(source, dtype=torch.float32)
        self.tokenizer = prunekit.checkpoint.load_tokenizer(source)
        if text is None:
            documents = load_corpus("embedded", "calibration", {})
            held = load_corpus("embedded", "eval", {})
        else:
            found = read_file(Path(text))
            documents, held = found[: len(found) * 5 // 6], found[len(found) * 5 // 6 :]
            self.folder = tempfile.TemporaryDirectory()
            path = Path(self.folder.name) / "train.jsonl"
            path.write_text("\n".join(json.dumps({"text": part}) for part in documents))
            self.corpus = str(path)
        self.calibration = calibration_windows(documents, self.tokenizer, 64, WINDOW, 0)
        self.windows = evaluation_windows(held, self.tokenizer, WINDOW, 16_384, name)

    def perplexity(self, model: Any) -> float:
        return perplexity(model, self.windows, 32, self.name)

    def pruned(self, method: str, ratio: float) -> Any:
        model = copy.deepcopy(self.model)
        prunekit.prune(
            model,
            method=method,
            ratio=ratio,
            calibration=self.calibration,
            overrides=["shapes=free"],
        )
        return model

    def recovered(self, pruned: Any, kind: str, **more: Any) -> dict[str, Any]:
        model, began = copy.deepcopy(pruned), time.perf_counter()
        options = {
            "samples": ROWS.get(self.name, 1200),
            "batch_size": 16,
            "length": WINDOW,
            "evaluations": 0,
            "checkpoints": 0,
        }
        settings = Recovery(corpus=self.corpus, **options | KINDS[kind] | more)
        teacher = self.model if settings.needs_teacher else None
        known = cfg.check(cfg.compose(["output_dir=none"])).corpora
        with tempfile.TemporaryDirectory() as folder:
            found = recover(
                model,
                self.tokenizer,
                settings,
                known=known,
                seed=0,
                folder=Path(folder),
                teacher=teacher,
            )
        seconds = time.perf_counter() - began
        return {"perplexity": self.perplexity(model), "tokens": found.tokens, "seconds": seconds}


def rows(setting: Setting) -> list[dict[str, Any]]:
    found = []

    def note(method: str, ratio: float, what: str, figures: dict[str, Any]) -> None:
        found.append(
            {"model": setting.name, "method": method, "ratio": ratio, "recovery": what, **figures}
        )
        print(found[-1], flush=True)

    note("dense", 0.0, "–", {"perplexity": setting.perplexity(setting.model)})
    for ratio in (0.2, 0.45):
        for method in ("slimgpt", "llm_pruner"):
            pruned = setting.pruned(method, ratio)
            note(method, ratio, "–", {"perplexity": setting.perplexity(pruned)})
            for kind in KINDS:
                note(method, ratio, kind, setting.recovered(pruned, kind))
    pruned = setting.pruned("llm_pruner", 0.2)
    for samples in (75, 300):
        for kind in KINDS:
            note(
                "llm_pruner",
                0.2,
                f"{kind}, {samples} rows",
                setting.recovered(pruned, kind, samples=samples),
            )
    for part in ("mlp", "attention"):
        note(
            "llm_pruner",
            0.2,
            f"lora, {part} alone",
            setting.recovered(pruned, "lora", targets=part),
        )
    return found


if __name__ == "__main__":
    setting, path = Setting(*sys.argv[1:]), HERE / "recovery.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [row for row in before if row["model"] != setting.name]
    write(
        "recovery",
        {**environment("recovery"), "repeats": 1, "note": NOTE, "rows": kept + rows(setting)},
    )
