"""The model card: `README.md` of a pruned model's folder, in the hub's form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prunekit.report.document import aim, title
from prunekit.report.markdown import escaped, render_block
from prunekit.report.tables import summary

_PATHS = re.compile(
    r"(?<==)(?:/|~/|\.{1,2}/)(?:[^\s,/'\"]+/)*(?=[^\s,/'\"]+)"
)  # where a file lies is nobody's business
_LOAD = {
    "stock": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)""",
    "remote": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # runs modeling_prunekit.py
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)""",
    "prunekit": """import prunekit
from transformers import AutoModelForCausalLM, AutoTokenizer

prunekit.register_with_transformers()  # or: prunekit.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)""",
}
_WHY = {
    "stock": "transformers' own class, and whatever builds on it, loads this folder.",
    "remote": "Its sizes are none that transformers' own class builds: the file beside the weights does; prunekit "
    "need not be installed.",
    "prunekit": "Its sizes are none that transformers' own class builds: `pip install prunekit`.",
}


def model_card(report: Mapping[str, Any], loading: str) -> str:
    """The card's text.

    Args:
        report: of the run; `base` in it is the dense model's name on the hub, if it came from
            there.
        loading: what loads the folder: stock (transformers alone), remote (with its
            code) or prunekit.
    """
    from huggingface_hub import ModelCardData

    method = report.get("method")
    data = ModelCardData(
        base_model=report.get("base"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["prunekit", "pruning", "structured-pruning", *([str(method)] if method else [])],
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {escaped(title(report))}", escaped(_done(report))]
    parts += ["## Results", render_block(summary(report))]
    parts += [escaped(f"{name}: {row['protocol']}.") for name, row in report["perplexity"].items()]
    parts += ["## Loading", _WHY[loading], f"```python\n{_LOAD[loading]}\n```"]
    if report.get("command"):
        parts += ["## Made by", f"```sh\n{_PATHS.sub('', report['command'])}\n```"]
    made = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n\n".join([*parts, escaped(f"Seed {report['seed']}; {made}.")]) + "\n"


def _done(report: Mapping[str, Any]) -> str:
    """What was done, in a few sentences."""
    lines = [
        f"{report.get('base') or 'A language model'} made smaller by structured pruning with prunekit."
    ]
    if aimed := aim(report):
        lines.append(f"Method: {report.get('method')}. {aimed}")
    if text := report.get("calibration"):
        lines.append(
            f"Calibration: {text['samples']} sequences of {text['sequence_length']} tokens of {text['corpus']}, "
            f"seed {text['seed']}."
        )
    if found := report.get("recovery"):
        lines.append(
            f"Recovered by fine-tuning: {found['steps']} steps, {found['tokens']:,} tokens."
        )
    return " ".join(lines)
