"""The model card: `README.md` of a pruned model's folder, in the form of the hub."""

from __future__ import annotations

import re

from prunekit.report.document import aim, tell_vocabulary, title
from prunekit.report.markdown import escape, render_block
from prunekit.report.record import Report
from prunekit.report.tables import summary

# The folders of a path in a command: where files lie on the author's machine is private.
_FOLDERS = re.compile(r"(?<==)(?:/|~/|\.{1,2}/)(?:[^\s,/'\"]+/)*(?=[^\s,/'\"]+)")
_LOAD = {
    "stock": """from transformers import {model}, {inputs}

model = {model}.from_pretrained(folder)
{name} = {inputs}.from_pretrained(folder)""",
    "remote": """from transformers import {model}, {inputs}

# trust_remote_code=True runs modeling_prunekit.py
model = {model}.from_pretrained(folder, trust_remote_code=True)
{name} = {inputs}.from_pretrained(folder, trust_remote_code=True)""",
    "prunekit": """import prunekit
from transformers import {model}, {inputs}

prunekit.register_with_transformers()  # or: prunekit.from_pretrained(folder)
model = {model}.from_pretrained(folder)
{name} = {inputs}.from_pretrained(folder)""",
}
# Auto class → what the hub calls its task.
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
_WHY = {
    "stock": "transformers' own class, and whatever builds on it, loads this folder.",
    "remote": "Its sizes are none that transformers' own class builds: the file beside the weights "
    "does; prunekit need not be installed.",
    "prunekit": "Its sizes are none that transformers' own class builds: `pip install prunekit`.",
}

_EMPTIED = (
    "{layers} without attention or without FFN: llama.cpp runs the model's GGUF file, vLLM's "
    "Transformers backend can't run the folder (tried with vLLM 0.32); `scope.min_units=1` would "
    "keep a unit of each."
)


def model_card(
    report: Report,
    loading: str,
    model: str = "AutoModelForCausalLM",
    inputs: str = "AutoTokenizer",
) -> str:
    """The text of the card.

    Args:
        report: the report of the run; its `base` is the dense model's name on the hub.
        loading: what loads the folder: stock (transformers alone), remote (transformers with the
            code beside the weights) or prunekit.
        model: the name of the auto class that loads the model.
        inputs: the name of the auto class that loads what prepares its inputs.
    """
    from huggingface_hub import ModelCardData

    method = [report.method] if report.method else []
    load = _LOAD[loading].format(
        model=model, inputs=inputs, name=inputs.removeprefix("Auto").lower()
    )
    data = ModelCardData(
        base_model=report.base,
        library_name="transformers",
        pipeline_tag=_TASKS.get(model),
        tags=["prunekit", "pruning", "structured-pruning", *method],
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {escape(title(report))}", escape(_done(report))]
    parts += ["## Results", render_block(summary(report))]
    measured = (report.perplexity or {}).items()
    parts += [escape(f"{corpus}: {row.protocol}.") for corpus, row in measured]
    parts += ["## Loading", _WHY[loading], f"```python\n{load}\n```"]
    if without := _count_without_sublayer(report):
        parts.append(_EMPTIED.format(layers=f"{without} layer{'s' if without > 1 else ''}"))
    if report.command:
        parts += ["## Made by", f"```sh\n{_FOLDERS.sub('', report.command)}\n```"]
    packages = [f"{name} {version}" for name, version in (report.versions or {}).items()]
    parts.append(escape(f"Seed {report.seed}; {', '.join(packages)}."))
    return "\n\n".join(parts) + "\n"


def _count_without_sublayer(report: Report) -> int:
    """How many layers have lost their attention, their FFN, or both."""
    layers = report.layers or ()
    return sum(any(units.kept == 0 for units in layer.kinds.values()) for layer in layers)


def _done(report: Report) -> str:
    """What was done, in a few sentences."""
    base = report.base or "A language model"
    sentences = [f"{base} made smaller by structured pruning with prunekit."]
    if aimed := aim(report):
        sentences.append(f"Method: {report.method}. {aimed}")
    if reduced := tell_vocabulary(report):
        sentences.append(reduced)
    if text := report.calibration:
        origin = text.corpus
        if text.documents is not None:
            origin = f"{text.documents:,} documents of {text.corpus}"
        sentences.append(
            f"Calibration: {text.samples} sequences of {text.sequence_length} tokens of "
            f"{origin}, seed {text.seed}."
        )
    if recovery := report.recovery:
        sentences.append(
            f"Recovered by fine-tuning: {recovery.steps} steps, {recovery.tokens:,} tokens."
        )
    return " ".join(sentences)
