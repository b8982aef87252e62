"""`Report`: what `report.json` holds, typed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from prunekit.errors import DataError
from prunekit.report.parts import (
    Calibration,
    Continuations,
    LargeTokens,
    LayerError,
    LayerKept,
    LeftOut,
    Perplexity,
    PolicyShares,
    Ratio,
    RecoveryFigures,
    Target,
    TaskScores,
    Throughput,
    Vocabulary,
)
from prunekit.report.plain import from_plain, schema_of, to_plain

# The first keys of the file that `task=prune` writes; the others follow in the order of the fields.
_PRUNING_FIRST = (
    *("task", "seed", "command", "versions", "method", "ratio", "parameters", "target", "policy"),
    *(
        "steps",
        "layers",
        "left_out",
        "seconds",
        "peak_memory_bytes",
        "activation_bytes",
        "base",
        "calibration",
        "vocabulary",
        "float64",
    ),
)
# Keys that are written as null too, where the key beside them is written.
_NULL_BESIDE = {"command": "task", "base": "calibration"}
# The keys that stay true of a pruned model once it is fine-tuned.
_OF_PRUNING = (
    *("base", "method", "ratio", "target", "policy"),
    *("steps", "layers", "left_out", "calibration", "vocabulary"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Report(Mapping[str, Any]):
    """The figures of a run; which of them there are depends on the task and on what was asked.

    `report["ratio"]["achieved"]` reads it as the mapping that report.json is: a part comes as plain
    dicts, lists and numbers, and a key that the run has no figure for raises KeyError. The
    attributes give the same parts as dataclasses, None where there is none.

    Attributes:
        task: prune, evaluate or recover.
        seed: the seed of the run.
        command: the command line that repeats the run; null where the run had none.
        versions: package → version.
        model: the model that was evaluated, as it was named; of task=evaluate only.
        base: the name of the dense model on the hub; null where it did not come from there.
        method: the preset of the pruning.
        ratio: the share of all parameters that was removed.
        target: the target, where it was no ratio.
        policy: how the policy spread the target over the groups.
        steps: kind of group → the number that divides the units that stay in each that is cut.
        layers: what each layer kept.
        left_out: groups of the kinds asked for that can't be cut; left out where there are none.
        calibration: the text that units were chosen by.
        large_tokens: how much of each Hessian the largest tokens own; of task=tokens only.
        vocabulary: the tokens that went; left out where all stayed.
        float64: group → how many of its Hessians took float64 to invert; left out where none did.
        recovery: how the pruned model was fine-tuned.
        models: the columns of what was measured, in order.
        parameters: column → number of parameters.
        weight_bytes: column → bytes of the weights as they are stored.
        macs: column → multiply-adds.
        macs_protocol: what the multiply-adds are of.
        macs_by_module: column → kind of module → multiply-adds.
        perplexity: corpus → perplexity of each model.
        tasks: name of lm-eval → scores of each model.
        layer_error: the error of each layer's output against the dense model.
        warnings: what a reader should know, in whole sentences.
        samples: continuations of the prompts.
        evaluation_bytes: column → bytes of memory at the peak, while the speed was measured.
        latency: tokens per second.
        seconds: stage → wall-clock time.
        peak_memory_bytes: stage → bytes of memory at the peak.
        activation_bytes: device, host and file → bytes that calibration kept there at most.
    """

    task: str | None = None
    seed: int | None = None
    command: str | None = field(default=None, metadata={"null": True})
    versions: Mapping[str, str] | None = None
    model: str | None = None
    base: str | None = field(default=None, metadata={"null": True})
    method: str | None = None
    ratio: Ratio | None = None
    target: Target | None = None
    policy: PolicyShares | None = None
    steps: Mapping[str, int] | None = None
    layers: tuple[LayerKept, ...] | None = None
    left_out: tuple[LeftOut, ...] | None = None
    calibration: Calibration | None = None
    large_tokens: tuple[LargeTokens, ...] | None = None
    vocabulary: Vocabulary | None = None
    float64: Mapping[str, int] | None = None
    recovery: RecoveryFigures | None = None
    models: tuple[str, ...] | None = None
    parameters: Mapping[str, int] | None = None
    weight_bytes: Mapping[str, int] | None = None
    macs: Mapping[str, int] | None = None
    macs_protocol: str | None = None
    macs_by_module: Mapping[str, Mapping[str, int]] | None = None
    perplexity: Mapping[str, Perplexity] | None = None
    tasks: Mapping[str, TaskScores] | None = None
    layer_error: tuple[LayerError, ...] | None = None
    warnings: tuple[str, ...] | None = None
    samples: tuple[Continuations, ...] | None = None
    evaluation_bytes: Mapping[str, int] | None = None
    latency: Throughput | None = None
    seconds: Mapping[str, float] | None = None
    peak_memory_bytes: Mapping[str, int] | None = None
    activation_bytes: Mapping[str, int] | None = None

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys():
            raise KeyError(key)
        return to_plain(getattr(self, key))

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def _keys(self) -> list[str]:
        """The keys of report.json, in its order."""
        names = [own.name for own in fields(self)]
        if self.task in (None, "prune"):
            names = list(dict.fromkeys([*_PRUNING_FIRST, *names]))
        return [name for name in names if self._is_written(name)]

    def _is_written(self, name: str) -> bool:
        beside = _NULL_BESIDE.get(name, name)
        return getattr(self, name) is not None or getattr(self, beside) is not None

    def merge(self, other: Report) -> Report:
        """This report with the parts that the other one has; they replace parts of the same key."""
        parts = {own.name: getattr(other, own.name) for own in fields(other)}
        return replace(self, **{name: part for name, part in parts.items() if part is not None})

    def pruning_part(self) -> Report:
        """What still holds of a pruned model once it is fine-tuned: how and what was cut."""
        return Report(**{name: getattr(self, name) for name in _OF_PRUNING})

    def to_json(self) -> str:
        """The text of report.json. Raises ValueError where a figure is NaN or infinite."""
        return json.dumps(dict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote; DataError where it is something else."""
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"report: not JSON: {error}") from error
        return cls.from_plain(plain)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Report:
        """The report of the mapping that report.json is; DataError where a part does not fit."""
        report: Report = from_plain(cls, plain, "report")
        return report


def schema() -> dict[str, Any]:
    """The JSON Schema of report.json."""
    return schema_of(Report)
