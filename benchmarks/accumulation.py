"""SlimGPT's figure 2: how the error of one cut layer grows through the layers after it.

python benchmarks/accumulation.py embedded                                            # the embedded
model python benchmarks/accumulation.py stories260K MODEL_FOLDER CALIBRATION_TEXT HELD_OUT_TEXT

Each call replaces its own model's table in benchmarks/accumulation.json.
"""

import copy
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from page import HERE, environment, write
from torch import Tensor, nn

import prunekit
import prunekit.checkpoint
from prunekit import config as cfg
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import calibration_windows, evaluation_windows
from prunekit.demo import DEMO_MODEL
from prunekit.evaluation.perplexity import perplexity

DRAWS, SAMPLES, WINDOW, EVAL_TOKENS = range(3), 128, 128, 16_384
NOTE = (
    "The first layer alone loses 25, 50 or 75 % of its weights, as in SlimGPT's figure 2, or all "
    "layers together 20 % of all parameters; the squared difference between dense and pruned on "
    "held-out text, over the dense energy. The paper shows the FFNs' error as it is: multiply by "
    "the dense energy, the first row. Its error grows with depth, and faster than the cut; the "
    "second holds here. Contradiction: only the energy makes it grow with depth. Relative to it, "
    "one cut layer's error in the FFNs falls on stories260K; on the embedded model it grows at 75 "
    "% alone, from 35 to 61 %. In the stream it grows by 16 to 37 % on the one, not on the other. "
    "With all layers cut, target=residual lowers the stream's error hardly in the first layers, by "
    "8 to 18 % in the last ones."
)


@torch.inference_mode()
def activations(model: Any, windows: Tensor) -> dict[str, list[Tensor]]:
    """What every layer leaves of the residual stream, and what its FFN gives."""
    found: dict[str, list[Tensor]] = {"states": [], "ffn": []}

    def keep(name: str) -> Any:
        return lambda _, __, output: found[name].append(
            output[0] if isinstance(output, tuple) else output
        )

    layers = model.get_decoder().layers
    hooks = [layer.register_forward_hook(keep("states")) for layer in layers]
    hooks += [layer.mlp.register_forward_hook(keep("ffn")) for layer in layers]
    model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def errors(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> list[float]:
    return [
        ((b - a).square().sum() / a.square().sum()).item()
        for a, b in zip(dense, pruned, strict=True)
    ]


def cuts(model: Any) -> dict[str, tuple[float, str]]:
    """Name → the ratio of all parameters, the policy."""
    first = sum(p.numel() for p in model.get_decoder().layers[0].parameters() if p.ndim > 1)
    share = first / sum(p.numel() for p in model.parameters())
    alone = {f"first layer, {part:.0%}": (part * share, "single") for part in (0.25, 0.5, 0.75)}
    return alone | {
        f"all layers, 20 %, {policy}": (0.2, policy) for policy in ("log_increase", "uniform")
    }


def measure(
    name: str, folder: str | None = None, text: str = "embedded", held_out: str = "embedded"
) -> dict:
    source, corpora = folder or DEMO_MODEL, cfg.check(cfg.compose([])).corpora
    model: nn.Module = prunekit.from_pretrained(source, dtype=torch.float32)
    tokenizer = prunekit.checkpoint.load_tokenizer(source)
    documents = load_corpus(text, "calibration", corpora)
    windows = evaluation_windows(
        load_corpus(held_out, "eval", corpora), tokenizer, WINDOW, EVAL_TOKENS, name
    )
    dense, rows = activations(model, windows), []
    for cut, (ratio, policy) in cuts(model).items():
        for target in ("pruned", "residual"):
            draws: dict[str, list[list[float]]] = {"states": [], "ffn": [], "perplexity": []}
            for seed in DRAWS:
                pruned = copy.deepcopy(model)
                tokens = calibration_windows(documents, tokenizer, SAMPLES, WINDOW, seed)
                options = ["shapes=free", f"policy={policy}", f"compensation.target={target}"]
                prunekit.prune(pruned, ratio=ratio, calibration=tokens, overrides=options)
                found = activations(pruned, windows)
                for key in dense:
                    draws[key].append(errors(dense[key], found[key]))
                draws["perplexity"].append([perplexity(pruned, windows, 32, name)])
            spread = {
                k: [(statistics.mean(v), statistics.stdev(v)) for v in zip(*d, strict=True)]
                for k, d in draws.items()
            }
            rows.append(
                {"cut": cut, "target": target, **spread, "perplexity": spread["perplexity"][0]}
            )
            print(rows[-1], flush=True)
    energy = {key: [a.square().mean().item() for a in values] for key, values in dense.items()}
    return {
        "model": name,
        "dense": perplexity(model, windows, 32, name),
        "energy": energy,
        "rows": rows,
    }


def main() -> None:
    found = measure(*sys.argv[1:])
    path = HERE / "accumulation.json"
    tables = json.loads(path.read_text())["tables"] if path.exists() else []
    tables = sorted(
        [*(t for t in tables if t["model"] != found["model"]), found], key=lambda t: t["model"]
    )
    header = {**environment("accumulation"), "repeats": 1, "draws": len(DRAWS), "note": NOTE}
    write("accumulation", {**header, "tables": tables})


if __name__ == "__main__":
    main()
