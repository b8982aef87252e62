"""Every causal language model type of transformers as a tiny random model: pruned by three methods,
compared with the masked model, generated with, saved and loaded.

Each type has a process of its own, forked from one that has imported everything, with limits on
CPU time and memory. A type's row is written as soon as it is known, with the revision of the tree.

    python benchmarks/families.py                    all types
    python benchmarks/families.py --only mamba jamba  these types, in place of their rows
    python benchmarks/families.py --missing          types that have no row yet
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from signal import SIGXCPU
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from page import environment, write

SECONDS, MEMORY = 240, 8 << 30  # of CPU time and of address space
NOTE = (
    "A random model of some 100,000 parameters of each type (`tiny_models.py`) is traced, pruned "
    "by magnitude, slimgpt and llm_pruner at 20 % with the default groups (at 5 % where 20 % is "
    "out of reach), compared with the masked model on new inputs, generated with, saved, and "
    "loaded by prunekit, by remote code and by registration (`family_trial.py`). Refused means: "
    "by an error of prunekit, before any unit is chosen. Each row names the revision at which it "
    "was taken, its seconds are of CPU time. Zamba's Mamba stays whole under slimgpt, "
    "because it multiplies what it would repair in a way that shows no inputs. gemma3n's tower was "
    "built by timm 1.0.31, which is no dependency. "
    "Both gemma4 assistants, drafting heads that read another model's keys, can't be built by "
    "transformers 5.23 itself, whose config lets all layers share keys that no layer computes: of "
    "such a type a folder with its config is given to prunekit, which refuses it (step folder)."
)
KEPT = ("type", "verdict", "revision", "parameters", "seconds", "steps", "cut")  # of a row


def run_type(model_type: str) -> dict[str, Any]:
    """Try a type in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, theirs), daemon=True)
    process.start()
    theirs.close()
    row: dict[str, Any] = {"type": model_type, "steps": {}, "verdict": "fails"}
    try:
        row = ours.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        end = f"longer than {SECONDS} s" if code == -SIGXCPU else f"it ended with status {code}"
        row["steps"]["process"] = f"fails: {end}"
    process.kill()
    process.join()
    return row


def _child(model_type: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        import transformers.dynamic_module_utils as modules

        modules.HF_MODULES_CACHE = cache
        from family_trial import try_type

        pipe.send(try_type(model_type))


def without_folders(steps: dict[str, str]) -> dict[str, str]:
    """What came of each step, without this machine's folders of packages and models."""
    folders = re.compile(r"\S*/site-packages/|/tmp/\w+/")
    return {step: folders.sub("", text) for step, text in steps.items()}


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Type → its row, the last one that was written."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["type"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--order", nargs="+", default=[], metavar="TYPE", help="these come first")
    parser.add_argument("--limit", type=int, help="so many types at most")
    parser.add_argument("--rows", type=Path, default=Path("families.jsonl"))
    parser.add_argument("--table", action="store_true", help="write families.json and the page")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import family_trial  # noqa: F401 - what every child needs
    from tiny_models import TYPES
    from transformers.utils import logging

    logging.set_verbosity_error()
    revision = environment("families")["revision"]
    there = read_rows(args.rows)
    order = dict.fromkeys([*args.order, *TYPES])
    types = args.only or [name for name in order if not args.missing or name not in there]
    for model_type in types[: args.limit]:
        row = run_type(model_type) | {"revision": revision}
        with args.rows.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{row['verdict']:8} {model_type} {row.get('seconds', '')}", file=sys.stderr)
        sys.stderr.flush()
    rows = read_rows(args.rows)
    print(Counter(row["verdict"] for row in rows.values()), file=sys.stderr)
    if args.table:
        result = environment("families") | {"repeats": 1, "note": NOTE}
        result["rows"] = [
            {k: row[k] for k in KEPT if k in row} | {"steps": without_folders(row["steps"])}
            for row in rows.values()
        ]
        write("families", result)


if __name__ == "__main__":
    main()
