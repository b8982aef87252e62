"""LLM-Pruner's table 13 at small scale: the dense and the pruned model, their weights in 8 and 4
bits by torchao.
"""

import copy
from typing import Any

import torch
import torchao
from page import environment, write
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup

import prunekit
import prunekit.checkpoint
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import calibration_windows, evaluation_windows
from prunekit.demo import DEMO_MODEL
from prunekit.evaluation.perplexity import perplexity
from prunekit.evaluation.speed import measure_speed

RATIO, GROUP, REPEATS = 0.2, 32, 5
SHAPES = {
    "pruned": ["shapes=free"],
    "pruned, shapes=aligned": ["shapes=aligned", f"scope.width_multiple={GROUP}"],
}
KINDS: dict[str, Any] = {
    "float32": None,
    "int8": Int8WeightOnlyConfig,
    "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)),
}
NOTE = (
    "LLM-Pruner's table 13 on the embedded model, 20 % of the parameters gone by SlimGPT. All "
    "linears but the head, which is tied to the embedding and stays float32: int8 with a scale for "
    "each row, int4 with one for every 32 numbers of a row. torchao 0.18 has no packed 4 bits for "
    "CPUs: its IntxWeightOnlyConfig rounds to 4 bits and holds each number in a byte; the next "
    "column is what they would take packed. Where there are no figures, torchao refuses widths "
    "that 32 doesn't divide; shapes=aligned scope.width_multiple=32 makes others, for 0.06 of "
    "perplexity. int8 costs 0.01 of perplexity at most and leaves a third of the bytes; int4 costs "
    "2 %, on the pruned model as on the dense one. In bytes alone quantizing gives more than "
    "pruning: dense in packed 4 bits is better than pruned in 8, and smaller. int8 is about as "
    "fast as float32 and int4 decodes slower: each call makes floats of the weights. Other "
    "programs shared the two CPUs: a run before gave twice the tokens/s, in about these ratios."
)


def linear(module: nn.Module, name: str) -> bool:
    """All linears but the head, which is tied to the embedding."""
    return isinstance(module, nn.Linear) and name != "lm_head"


def parts(tensor: Tensor) -> list[Tensor]:
    """What a tensor is stored as; a quantized one as numbers, scales and zero points."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [
        part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))
    ]


def held(model: nn.Module, bits: int = 8) -> float:
    """Bytes of the weights, tied ones once; of int8 numbers `bits` are counted."""
    found = [part for parameter in model.parameters() for part in parts(parameter)]
    return sum(
        part.numel() * (bits / 8 if part.dtype == torch.int8 else part.itemsize) for part in found
    )


def main() -> None:
    dense = prunekit.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    tokenizer = prunekit.checkpoint.load_tokenizer(DEMO_MODEL)
    windows = evaluation_windows(
        load_corpus("embedded", "eval", {}), tokenizer, 128, 16_384, "embedded"
    )
    calibration = calibration_windows(
        load_corpus("embedded", "calibration", {}), tokenizer, 128, 128, 0
    )
    models = {"dense": dense}
    for name, options in SHAPES.items():
        models[name] = copy.deepcopy(dense)
        prunekit.prune(models[name], ratio=RATIO, calibration=calibration, overrides=options)
    quantized, rows = {}, []
    for name, model in models.items():
        for kind, config in KINDS.items():
            row: dict[str, Any] = {
                "model": name,
                "weights": kind,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
            found = copy.deepcopy(model)
            try:
                if config:
                    quantize_(found, config(), filter_fn=linear)
            except AssertionError as error:
                rows.append(row | {"refused": str(error)})
                continue
            quantized[name, kind] = found
            row |= {"perplexity": perplexity(found, windows, 32, "embedded"), "bytes": held(found)}
            rows.append(row | ({"packed": held(found, 4)} if kind == "int4" else {}))
            print(rows[-1], flush=True)
    measured = measure_speed(
        {f"{name} {kind}": found for (name, kind), found in quantized.items()}, repeats=REPEATS
    )
    for row in rows:
        for key in ("prefill", "decode"):
            figures = getattr(measured, f"{key}_tokens_per_second")
            row[key] = figures.get(f"{row['model']} {row['weights']}")
    header = {**environment("quantize"), "torchao": torchao.__version__, "repeats": REPEATS}
    write("quantize", {**header, "protocol": measured.protocol, "note": NOTE, "rows": rows})


if __name__ == "__main__":
    main()
