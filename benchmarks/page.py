"""RESULTS.md, from the JSON files that the other scripts here leave."""

import json
import math
import os
import platform
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).parent
TARGETS = ("pruned", "residual")


def environment(script: str) -> dict:
    """What a page says of a run: the command, the machine and the revision, without any host's
    name.
    """
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    )
    machine = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    versions = {"torch": torch.__version__, "revision": described.stdout.strip() or "unknown"}
    return {"command": f"python benchmarks/{script}.py", **machine, **versions}


def write(name: str, result: dict) -> None:
    """Leave `<name>.json` and bring the page up to date with all of them."""
    (HERE / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    parts = [
        section(json.loads((HERE / f"{n}.json").read_text()))
        for n, section in SECTIONS.items()
        if _there(n)
    ]
    (HERE / "RESULTS.md").write_text("\n\n".join("\n".join(lines) for lines in parts) + "\n")
    print("\n".join(SECTIONS[name](result)))


def _there(name: str) -> bool:
    return (HERE / f"{name}.json").exists()


def head(title: str, name: str, result: dict, *more: str) -> list[str]:
    often = f"medians of {result['repeats']}" if result["repeats"] > 1 else "each once"
    run = [
        f"{result['machine']}, {result['cpus']} CPUs",
        f"torch {result['torch']}",
        f"{result['threads']} thread(s)",
    ]
    return [
        f"# {title}",
        "",
        f"`{result['command']}`, {', '.join([*run, *more])}, {often}, "
        f"revision `{result['revision']}`. Generated from `{name}.json`.",
        "",
    ]


def table(columns: str, rows: list[list[str]]) -> list[str]:
    """A Markdown table; a column's name that starts with `>` is set to the right."""
    names = [name.strip() for name in columns.split("|")]
    rule = ["---:" if name.startswith(">") else "---" for name in names]
    cells = [[name.lstrip(">") for name in names], *rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:]]


def solver(result: dict) -> list[str]:
    names = {
        "invert": "invert",
        "greedy": "greedy",
        "dynamic_group": "dynamic",
        "released_group": "released",
    }
    names |= {"fixed_group": "fixed", "reinverting": "released, H inverted again"}
    rows = []
    for r in result["rows"]:
        seconds = r["seconds"]
        cells = [f"{seconds[k] / seconds['inversion']:.2f}" if k in seconds else "–" for k in names]
        rows.append(
            [
                f"{r['d']:,} × {r['n']:,}",
                r["dtype"],
                f"{r['share']:.0%}",
                f"{seconds['inversion']:.3f}",
                *cells,
            ]
        )
    loop = result["naive"]
    naive = [
        [f"{r['d']:,} × {r['n']:,}", *(f"{r['seconds'][k]:.3f}" for k in ("naive", "greedy"))]
        + [f"{r['seconds']['naive'] / r['seconds']['greedy']:.1f}"]
        for r in loop["rows"]
    ]
    exponents = [
        "grows as n to the",
        *(f"{loop['exponents'][k]:.1f}" for k in ("naive", "greedy")),
        "–",
    ]
    return [
        *head("Choosing columns against inverting the Hessian they belong to", "solver", result),
        "Inversion: Cholesky and cholesky_inverse. The rest in units of it, of the same run; "
        "invert is the solver's, with its scaling and its checks. The released schedule with an "
        "inversion for every group is timed once.",
        "",
        *table(
            "W | dtype | >removed | >inversion, s | "
            + " | ".join(f">{name}" for name in names.values()),
            rows,
        ),
        "",
        "The naive loop, which updates W and A at every column; 20 % of the columns, float32:",
        "",
        *table("W | >naive, s | >greedy, s | >naive / greedy", [*naive, exponents]),
    ]


def tracer(result: dict) -> list[str]:
    rows = []
    for row in result["costs"]:
        ours, theirs = row["prunekit"], row["torch_pruning"]
        whole = theirs["build_seconds"] + theirs["groups_seconds"]
        rows.append(
            [
                row["model"],
                str(row["layers"]),
                f"{ours['seconds']:.2f}",
                f"{theirs['build_seconds']:.2f}",
            ]
            + [
                f"{whole:.2f}",
                f"{ours['seconds'] / whole:.2f}",
                f"{1000 * ours['seconds'] / row['layers']:.0f}",
            ]
            + [f"{ours['peak_mb']:.0f}", f"{theirs['peak_mb']:.0f}", str(row["repeats"])]
        )
    verdicts = [
        [c["model"], c["cut"], c["prunekit"], c["torch_pruning"]] for c in result["verdicts"]
    ]
    return [
        *head(
            "The tracer against torch-pruning's",
            "tracer",
            result,
            f"torch-pruning {result['torch_pruning']}",
        ),
        result["costs_note"],
        "",
        *table(
            "model | >layers | >prunekit, s | >torch-pruning's graph, s | >its graph and groups, s "
            "| >ratio | >prunekit, ms a layer | >prunekit, MB | >torch-pruning, MB | >repeats",
            rows,
        ),
        "",
        result["verdicts_note"],
        "",
        *table("model | what goes | prunekit | torch-pruning", verdicts),
    ]


def importance(result: dict) -> list[str]:
    setup = result["setup"]
    keys = ("seconds", "to_forward", "to_forward_backward")
    rows = [
        [r["name"].replace("_", " "), *(f"{r[k]:.2f}" for k in keys), f"{r['peak_mb']:.0f}"]
        for r in result["rows"]
    ]
    model = (
        f"hidden {setup['hidden_size']}, FFN {setup['intermediate_size']}, "
        f"{setup['num_hidden_layers']} layers, {setup['weights_mb']:.0f} MB of random float32 "
        f"weights; {setup['batches']} batches of {setup['batch'][0]} × {setup['batch'][1]} tokens"
    )
    return [
        *head(
            "Scoring against a forward and backward pass over the same tokens",
            "importance",
            result,
            model,
        ),
        result["note"],
        "",
        *table(
            "pass or importance | >CPU seconds | >/ forward | >/ forward and backward | >peak "
            "memory, MB",
            rows,
        ),
    ]


def experiments(result: dict) -> list[str]:
    lines = head(
        "The papers' comparisons, at small scale",
        "experiments",
        result,
        "seed 0, or mean ± spread of draws",
    )
    for found in result["tables"]:
        ratios = sorted({row["target"] for row in found["rows"]})
        names = list(dict.fromkeys(row["chosen"] for row in found["rows"]))
        at = {(row["chosen"], row["target"]): row for row in found["rows"]}
        dense = found["rows"][0]["dense"] if found["rows"] else float("nan")
        columns = " | ".join(["choice", *(f">{ratio:.1%} removed" for ratio in ratios)])
        order = sorted(
            names,
            key=lambda name: [
                at.get((name, r), {"pruned": float("inf")})["pruned"] for r in ratios
            ],
        )
        draws = max((row.get("runs", 1) for row in found["rows"]), default=1)
        drawn = f", {draws} calibration draws" if draws > 1 else ""
        lines += [f"## {found['model']}: experiment={found['experiment']}", ""]
        about = f"Held-out perplexity{drawn}; dense {dense:.2f}; revision `{found['revision']}`."
        lines += [f"{about} {found['note']}".rstrip()]
        cells = [
            [name, *(_format_figure(at.get((name, ratio))) for ratio in ratios)] for name in order
        ]
        lines += ["", *table(columns, cells), ""]
        if layered := [row for row in found["rows"] if "removed" in row]:
            lines += ["SlimGPT's figure 4, the ratio by layer (heads, FFN channels):", ""]
            layers = " | ".join(f">layer {i}" for i in range(len(layered[0]["removed"])))
            cells = [
                [f"{row['chosen']}, {row['target']:.0%} of all parameters"]
                + [
                    ", ".join(f"{share:.0%}" for share in layer.values())
                    for layer in row["removed"]
                ]
                for row in layered
            ]
            lines += [*table(f"choice | {layers}", cells), ""]
    return lines[:-1]


def _format_figure(row: dict | None) -> str:
    if row is None:
        return "–"
    return f"{row['pruned']:.2f}" + (f" ± {row['spread']:.2f}" if "spread" in row else "")


def accumulation(result: dict) -> list[str]:
    lines = head(
        "Error accumulation by depth",
        "accumulation",
        result,
        f"{result['draws']} calibration draws, mean ± spread",
    )
    lines += [result["note"], ""]
    for found in result["tables"]:
        layers = len(found["rows"][0]["states"])
        columns = " | ".join(
            ["cut", "target", *(f">layer {i}" for i in range(layers)), ">perplexity"]
        )
        for key, title in (
            ("states", "Residual stream after each layer"),
            ("ffn", "Output of each FFN"),
        ):
            lines += [f"## {found['model']}: {title.lower()}", ""]
            lines += [f"Dense perplexity {found['dense']:.2f}. {title}: error over energy, %.", ""]
            energy = [
                "dense energy, mean square",
                "–",
                *(f"{value:.3g}" for value in found["energy"][key]),
                "–",
            ]
            cells = [
                [
                    row["cut"],
                    row["target"],
                    *(f"{100 * m:.1f} ± {100 * s:.1f}" for m, s in row[key]),
                ]
                + [f"{row['perplexity'][0]:.2f} ± {row['perplexity'][1]:.2f}"]
                for row in found["rows"]
            ]
            lines += [*table(columns, [energy, *cells]), ""]
    return lines[:-1]


def layerwise(result: dict) -> list[str]:
    setup = result["setup"]
    model = (
        f"hidden {setup['hidden_size']}, FFN {setup['intermediate_size']}, "
        f"{setup['num_hidden_layers']} layers, float32; {setup['tokens'][0]} × "
        f"{setup['tokens'][1]} tokens; 20 % of the parameters go"
    )
    whole = [
        (f"prune, target={t}", {"run": result[t]["whole"]}, result[t]["whole_to_floor"])
        for t in TARGETS
    ]
    rows = [
        [
            name,
            *(
                f"{found[key]:.1f}" if key in found else "–"
                for key in ("forward", "products", "solver", "run")
            ),
        ]
        + [f"{ratio:.2f}"]
        for name, found, ratio in (
            ("floor", result["floor"], 1.0),
            *((f"layer-wise, target={t}", result[t], result[t]["run_to_floor"]) for t in TARGETS),
            *whole,
        )
    ]
    return [
        *head("The layer-wise run against its floor", "layerwise", result, model),
        result["note"],
        "",
        *table("CPU seconds | >forward | >products | >solver | >together | >/ floor", rows),
    ]


def streamed(result: dict) -> list[str]:
    weights, budget, opened, peak = (result[key] for key in ("weights", "budget", "opened", "peak"))
    allowed = 0.35 * weights + budget
    model = (
        f"hidden {result['setup']['hidden_size']}, FFN {result['setup']['intermediate_size']}, "
        f"{result['setup']['num_hidden_layers']} layers: {weights:,.0f} MiB of weights in bfloat16"
    )
    rows = [
        [
            name,
            f"{found:,.0f}",
            f"{found / weights:.0%}",
            f"{found - opened:,.0f}",
            f"{(found - opened) / weights:.0%}",
        ]
        for name, found in (
            ("opened", opened),
            ("traced", result["traced"]),
            ("loaded", result["loaded"]),
        )
    ]
    above = peak - opened
    rows.append(
        [
            "streamed",
            f"{peak:,.0f}",
            f"{peak / weights:.0%}",
            f"{above:,.0f}",
            f"{above / weights:.0%}",
        ]
    )
    stages = ", ".join(
        f"{name.replace('_', ' ')} {found:,.0f}" for name, found in result["stages"].items()
    )
    return [
        *head("The memory of a streamed run", "streamed", result, model),
        f"{result['note']} Its stages' peaks: {stages}. 35 % of the weights and the activation "
        f"budget of {budget} MiB are {allowed:,.0f} MiB: the streamed run takes {above:,.0f} above "
        f"the opened process, {peak:,.0f} with what that holds, Python and its libraries. "
        f"{result['cpu_seconds']:.0f} CPU seconds; `{' '.join(result['options'])}`.",
        *_reading_beside_the_work(result),
        "",
        *table("process | >peak | >of the weights | >above opened | >of the weights", rows),
    ]


def _reading_beside_the_work(result: dict) -> list[str]:
    """What reading and writing beside the work saves; nothing where it was not measured."""
    if "beside" not in result:
        return []
    found = result["beside"]
    now, in_turn = found["now"], found["in_turn"]
    return [
        "",
        f"`{found['command']}`, revision `{found['revision']}`, {found['layers']} layers, each "
        "once on a machine that others used as well: pruning takes "
        f"{now['seconds']:.0f} s ({now['cpu_seconds']:.0f} CPU seconds of the process), and "
        f"{in_turn['seconds']:.0f} s ({in_turn['cpu_seconds']:.0f}) where each piece of reading "
        f"and writing ends before the work goes on; peaks {now['peak']:,.0f} and "
        f"{in_turn['peak']:,.0f} MiB, both with one layer ahead in memory.",
    ]


def quality(result: dict) -> list[str]:
    lines = [
        *head("SlimGPT's choices over five calibration draws", "quality", result),
        result["note"],
        "",
    ]
    questions = dict.fromkeys(row["question"] for row in result["rows"])
    for question in questions:
        rows = [row for row in result["rows"] if row["question"] == question]
        models, settings = (
            list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "setting")
        )
        found = {(row["setting"], row["model"]): row for row in rows}
        cells = [
            [setting, *(_spread(found.get((setting, model)), question) for model in models)]
            for setting in settings
        ]
        lines += [
            f"## {question}",
            "",
            *table(" | ".join(["", *(f">{model}" for model in models)]), cells),
            "",
        ]
    return lines[:-1]


def _spread(row: dict | None, question: str) -> str:
    digits = 4 if "error" in question else 2
    return f"{row['mean']:.{digits}f} ± {row['spread']:.{digits}f}" if row else "–"


def recovery(result: dict) -> list[str]:
    lines = [*head("What recovery gives back", "recovery", result), result["note"], ""]
    rows = [
        [
            row["model"],
            row["method"],
            f"{row['ratio']:.0%}",
            row["recovery"],
            f"{row['perplexity']:.2f}",
            f"{row['tokens']:,}" if "tokens" in row else "–",
        ]
        for row in result["rows"]
    ]
    return lines + table("model | method | removed | recovery | >perplexity | >tokens", rows)


def quantize(result: dict) -> list[str]:
    rows = [
        [
            row["model"],
            row["weights"],
            f"{row['parameters']:,}",
            *(f"{row[key]:{form}}" if row.get(key) else "–" for key, form in QUANTIZED.items()),
        ]
        for row in result["rows"]
    ]
    columns = ">perplexity | >bytes | >at 4 bits | >prefill, tokens/s | >decode, tokens/s"
    return [
        *head("Quantizing a pruned model", "quantize", result, f"torchao {result['torchao']}"),
        f"{result['note']} Tokens/s: {result['protocol']}.",
        "",
        *table(f"model | weights | >parameters | {columns}", rows),
    ]


def families(result: dict) -> list[str]:
    rows = result["rows"]
    counts = Counter(row["verdict"] for row in rows)
    cells = [
        [
            f"`{row['type']}`",
            row["verdict"],
            row.get("revision", "older"),
            _kinds_cut(row),
            _what_fails(row),
        ]
        for row in sorted(rows, key=lambda row: row["type"])
    ]
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    return [
        *head("Every causal type of transformers", "families", result),
        f"{result['note']} Of {len(rows)} types tried: {summary}.",
        "",
        *table("type | verdict | at | groups cut by magnitude | what does not hold", cells),
    ]


def _kinds_cut(row: dict) -> str:
    kinds = row.get("cut", {}).get("magnitude", {}).get("kinds", {})
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "–"


def _what_fails(row: dict) -> str:
    """The steps that don't hold, equal ones once, without what would end a table's cell."""
    texts: dict[str, str] = {}
    for step, text in row["steps"].items():
        if text != "holds" and not step.startswith("dense"):
            short = " ".join(text.split()).replace("|", "/")[:160]
            texts[short] = f"{texts[short]}, {step}" if short in texts else step
    return "; ".join(f"{steps}: {text}" for text, steps in texts.items())


QUANTIZED = {
    "perplexity": ".2f",
    "bytes": ",.0f",
    "packed": ",.0f",
    "prefill": ",.0f",
    "decode": ",.1f",
}


def search(result: dict) -> list[str]:
    lines = head("Where to cut: formulas and policy=search", "search", result)
    lines += [
        "Perplexity of the pruned model, mean and spread over draws of the calibration windows; "
        "its mean increase over the dense one, and how the search's compares with that of the best "
        "of the other policies, on the same draws and with the same other options or none. "
        "Seconds: of pruning alone, the search within it. Evaluations: candidates judged; passes: "
        "all of their tokens, in passes over the calibration set. "
        f"{result['note']}",
        "",
    ]
    runs: dict[tuple[str, float], dict[str, list[dict]]] = {}
    for row in result["rows"]:
        policies = runs.setdefault((row["model"], row["ratio"]), {})
        policies.setdefault(row["policy"], []).append(row)
    for (model, ratio), policies in sorted(runs.items()):
        first = next(iter(policies.values()))[0]
        lines += [
            f"## {model}: {ratio:.0%} of all parameters",
            "",
            f"Dense {first['dense']:.2f}, {first['device']}; `{' '.join(first['options'])}`.",
            "",
            *table(
                "policy | >perplexity | >increase | >against the best other | >seconds | "
                ">evaluations | >passes | cuts taken",
                [_search_row(name, rows, policies) for name, rows in policies.items()],
            ),
            "",
        ]
    return lines[:-1]


def search_plan(result: dict) -> list[str]:
    lines = head("What a search takes: worked out", "search_plan", result)
    lines += [
        "At 20 %, by the defaults, at most. Bytes of the databases of both rounds, of which a run "
        "keeps one at a time, in memory and in its state; beside the weights in the same dtype "
        f"(where a database would be larger than {result['largest']:g} times them, levels reach "
        "less far). Candidates that are judged, and their tokens through all layers. Seconds: for "
        "LLaMA-7B's shape with 128 × 2,048 tokens on an H100, by its parts as [measured](gpu.md): "
        "exact cuts; databases, whose choice and repair take as much as eight cuts'; candidates, "
        "at the tokens a second of a cut's own passes.",
        "",
        *table(
            "model | >weights | >databases | >share | >exact cuts | >candidates | >tokens | "
            ">seconds",
            [
                [
                    name,
                    f"{plan['weights']:,}",
                    ", ".join(f"{nbytes:,}" for nbytes in plan["bytes"]),
                    f"{plan['share']:.2f}",
                    f"{plan['cuts']}",
                    f"{plan['candidates']:,}",
                    f"{plan['tokens']:,.0f}",
                    " + ".join(f"{s:,.0f} ({n})" for n, s in plan.get("seconds", {}).items()),
                ]
                for name, plan in result["plans"].items()
            ],
        ),
    ]
    return lines


def _increase(rows: list[dict]) -> float:
    return _mean_of("pruned", rows) - _mean_of("dense", rows)


def _increase_of_others(name: str, rows: list[dict], policies: dict[str, list[dict]]) -> float:
    """The least increase of the other policies on the draws of these rows; infinite without any.

    They have the options that the row has beside those of its policy, or none.
    """
    seeds = {row["seed"] for row in rows}
    shared = [option for option in name.split()[1:] if not option.startswith("policy.")]
    least = math.inf
    for other, found in policies.items():
        same = [row for row in found if row["seed"] in seeds]
        policy, *options = other.split()
        if policy != "search" and options in ([], shared) and len(same) == len(seeds):
            least = min(least, _increase(same))
    return least


def _search_row(name: str, rows: list[dict], policies: dict[str, list[dict]]) -> list[str]:
    searched = name.startswith("search")
    others = _increase_of_others(name, rows, policies)
    against = f"{_increase(rows) / others - 1:+.0%}" if searched and others < math.inf else ""
    taken = Counter(row["taken"] for row in rows if searched)
    return [
        name,
        _mean_and_spread([row["pruned"] for row in rows]),
        f"{_increase(rows):.2f}",
        against,
        f"{_mean_of('prune_seconds', rows):,.0f}",
        f"{_mean_of('evaluations', rows):,.0f}" if searched else "",
        f"{_mean_of('passes', rows):,.0f}" if searched else "",
        ", ".join(f"{cut} ({n})" if len(rows) > 1 else cut for cut, n in taken.items()),
    ]


def _mean_of(key: str, rows: list[dict]) -> float:
    return statistics.mean(row[key] for row in rows)


def gates(result: dict) -> list[str]:
    lines = head("Learned gates beside the solver and the search", "gates", result)
    lines += [
        "Perplexity, mean and spread over draws and seeds: as pruned; after the same LoRA; after "
        "one that is longer by what the pruning cost less than training the gates. Tokens: through "
        "all layers, forward alone and forward with backward, of the pruning; rows of 128 tokens "
        f"of the longer recovery. Seconds of the pruning. {result['note']}",
        "",
    ]
    runs: dict[tuple[str, float], dict[str, list[dict]]] = {}
    for row in result["rows"]:
        methods = runs.setdefault((row["model"], row["ratio"]), {})
        methods.setdefault(row["method"], []).append(row)
    for (model, ratio), methods in sorted(runs.items()):
        first = next(iter(methods.values()))[0]
        dense = ", ".join(f"{value:.2f} {text}" for text, value in first["dense"].items())
        lines += [
            f"## Gates on {model}: {ratio:.0%} of all parameters",
            "",
            f"Dense: {dense}. Trained on {first['train']}, {first['steps']} steps of "
            f"{first['batch_rows']} × {first['length']} tokens; calibrated on {first['samples']} "
            f"windows; recovery of {first['recovery']} rows at {first['recovery_rate']:g}; "
            f"{first['device_name']}, {first['processes']} process(es).",
            "",
        ]
        for text in first["dense"]:
            lines += table(
                f"{text} | >runs | >pruned | >recovered | >at equal compute | >forward | "
                ">forward and backward | >rows then | >seconds",
                [_gates_row(name, rows, text) for name, rows in methods.items()],
            )
            lines.append("")
    return lines[:-1]


def _gates_row(name: str, rows: list[dict], text: str) -> list[str]:
    stages = ("pruned", "recovered", "equal")
    perplexities = [[row[stage]["perplexity"][text] for row in rows] for stage in stages]
    return [
        name,
        f"{len(rows)}",
        *map(_mean_and_spread, perplexities),
        *(
            f"{_mean_of(key, [row['pruned'] for row in rows]):,.0f}"
            for key in ("forward", "trained")
        ),
        f"{_mean_of('rows', [row['equal'] for row in rows]):,.0f}",
        f"{_mean_of('seconds', [row['pruned'] for row in rows]):,.0f}",
    ]


def _mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def tokens(result: dict) -> list[str]:
    lines = head("Which choice, repair and budget cut best", "tokens", result)
    lines += [
        "Perplexity, mean and spread over draws of the calibration windows, beside the dense "
        "model's; the number behind a text is that of its tokens. equal: `method=slimgpt`. full: "
        "`importance.outputs=full`. everywhere, loss: `scope=global policy=uniform "
        "importance.compete=loss`. expected: `policy=expected_loss`; with full that is "
        "`method=surgeon`. Heads: KV heads and FFN channels; queries: query heads of all KV heads "
        f"too. {result['note']}",
        "",
    ]
    models: dict[str, list[dict]] = {}
    for row in result["rows"]:
        models.setdefault(row["model"], []).append(row)
    for model, rows in models.items():
        texts = list(rows[0]["perplexity"])
        runs: dict[tuple, list[dict]] = {}
        for row in rows:
            runs.setdefault((row["ratio"], row["groups"], row["variant"]), []).append(row)
        cells = [
            [
                f"{ratio:.0%}" if ratio else "dense",
                groups if ratio else "",
                variant if ratio else "",
                f"{len(own)}",
                *(_mean_and_spread([row["perplexity"][text] for row in own]) for text in texts),
            ]
            for (ratio, groups, variant), own in sorted(runs.items())
        ]
        columns = " | ".join(["cut", "groups", "variant", ">draws", *(f">{t}" for t in texts)])
        lines += [f"## {model}: perplexity", "", *table(columns, cells), ""]
    lines += [
        "## The share of the Hessian's trace that the largest tokens own",
        "",
        "`task=tokens`, 128 × 128 tokens, inputs of `o_proj` (heads) and `down_proj` (FFNs). The "
        "matrices where 1 % of the tokens own a tenth or more, and the others together.",
        "",
        *table(
            "model | matrix | >of 0.1 % | >of 1 % | positions of the 0.1 % (how many)",
            [row for model, shares in result["shares"].items() for row in _shares(model, shares)],
        ),
    ]
    return lines


def _shares(model: str, shares: list[dict]) -> list[list[str]]:
    """A row for each matrix with large tokens, and one for the range of all others."""
    large = [one for one in shares if one["percent"] >= 0.1]
    rows = [
        [
            model,
            one["group"],
            f"{one['permille']:.1%}",
            f"{one['percent']:.1%}",
            ", ".join(f"{place} ({count})" for place, count in one["positions"].items()),
        ]
        for one in large
    ]
    rest = [one for one in shares if one["percent"] < 0.1]
    spans = (
        f"{min(one[key] for one in rest):.1%} to {max(one[key] for one in rest):.1%}"
        for key in ("permille", "percent")
    )
    return [*rows, [model, f"{len(rest)} others" if large else f"all {len(rest)}", *spans, ""]]


SECTIONS = {
    "solver": solver,
    "tracer": tracer,
    "importance": importance,
    "layerwise": layerwise,
    "streamed": streamed,
    "experiments": experiments,
    "accumulation": accumulation,
    "quality": quality,
    "recovery": recovery,
    "quantize": quantize,
    "search": search,
    "search_plan": search_plan,
    "tokens": tokens,
    "gates": gates,
    "families": families,
}
