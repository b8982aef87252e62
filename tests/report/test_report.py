"""The reports against the mapping they render: every part comes and goes with its key, and what users wrote is text."""

import math


def make(layers=6, recovered=True, kinds=("attention", "mlp")):
    """A whole report of made-up figures; `kinds` are cut in every layer."""
    models = ["dense", "pruned", "recovered"] if recovered else ["dense", "pruned"]

    def each(*values):
        return dict(zip(models, values, strict=False))

    def score(*values):
        return {m: {"value": v, "stderr": 0.02} for m, v in each(*values).items()}

    totals = {"attention": 32, "mlp": 11008}
    wanted = [0.1 + 0.3 * math.log1p(i) / math.log1p(layers) for i in range(layers)]
    curve = [{"step": 0, "tokens": 0, "validation_loss": 2.9, "perplexity": {"validation": 18.2, "wikitext": 31.9}}]
    for step in range(10, 210, 10):
        row = {"step": step, "tokens": 4096 * step, "loss": 2.1 + 0.8 * math.exp(-step / 40), "learning_rate": 1e-4}
        if step % 40 == 0:
            loss = 2.2 + 0.6 * math.exp(-step / 50)
            row |= {"validation_loss": loss, "perplexity": {"validation": math.exp(loss), "wikitext": 14 + 800 / step}}
        curve.append(row)
    report = {
        "task": "prune",
        "models": models,
        "method": "slimgpt",
        "seed": 0,
        "versions": {"python": "3.11.2", "prunekit": "0.1.0", "torch": "2.13.0"},
        "command": "python -m prunekit method=slimgpt ratio=0.2 'data.calibration.path=a b.txt'",
        "ratio": {"target": 0.2, "achieved": 0.1999},
        "parameters": each(6_738_415_616, 5_391_000_123, 5_391_000_123),
        "weight_bytes": each(13_476_831_232, 10_782_000_246, 10_782_000_246),
        "macs": each(4.24e11, 3.39e11, 3.39e11),
        "macs_protocol": "one forward pass of 64 tokens",
        "macs_by_module": {m: {"attention": 1.4e11, "mlp": 2.7e11, "head": 8.4e9} for m in models},
        "perplexity": {
            "wikitext": each(5.68, 9.41, 7.02) | {"protocol": "65,536 tokens, windows of 128"},
            "ptb": each(27.34, 41.5, 33.123) | {"protocol": "65,536 tokens, windows of 128"},
        },
        "tasks": {
            "boolq": score(0.751, 0.66, 0.71) | {"metric": "acc", "samples": 500, "fewshot": 0},
            "piqa": score(0.788, 0.742, 0.766) | {"metric": "acc_norm", "samples": 500, "fewshot": 0},
            "arc_challenge": score(0.4, 0.33, 0.36) | {"metric": "acc_norm", "samples": 500, "fewshot": 0},
            "mmlu": score(0.45, 0.31, 0.38) | {"metric": "acc", "samples": 900, "fewshot": 5},
            "mmlu_law": score(0.41, 0.3, 0.35) | {"metric": "acc", "samples": 100, "fewshot": 5, "of": "mmlu"},
            "average": score(0.597, 0.51, 0.554),
        },
        "latency": {
            "protocol": "batch of 8 by 128 tokens, median of 5 in turn",
            "prefill_tokens_per_second": each(1200.0, 1400.0, 1400.0),
            "decode_tokens_per_second": each(21.5, 24.75, 24.7),
        },
        "evaluation_bytes": each(14 * 2**30, 12 * 2**30, 12 * 2**30),
        "warnings": ["layers.3.mlp: 683 channels are no multiple of 8"],
        "policy": {"shares": {f"model.layers.{i}.{kind}": 3 * wanted[i] for i in range(layers) for kind in kinds}},
        "layers": [
            {"index": i}
            | {kind: {"kept": round((1 - wanted[i]) * totals.get(kind, 64)), "total": totals.get(kind, 64)} for kind in kinds}
            for i in range(layers)
        ],
        "layer_error": [{"index": i} | dict(zip(models[1:], (0.002 * 1.3**i, 0.0013 * 1.3**i), strict=False)) for i in range(layers)],
        "samples": [
            {"prompt": "Once upon a time", "mode": "greedy"} | {m: f"there was a {m} model.\nIt ran." for m in models},
            {"prompt": "The", "mode": "sampled, temperature 0.8, top-p 0.95, seed 0"} | {m: "cat " * 60 for m in models},
        ],
        "seconds": {"load": 3.21, "prune": 754.0, "save": 12.0},
        "peak_memory_bytes": {"load": 2**30, "prune": 17 * 2**30, "save": 2**30},
    }  # fmt: skip
    if recovered:
        settings = {"rank": 8, "learning_rate": 1e-4, "targets": ["all"]}
        report["recovery"] = {"curve": curve, "steps": 200, "stopped_early": False, "best_step": 160, "settings": settings}
    return report
