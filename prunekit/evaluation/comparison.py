"""Evaluations of several models side by side, as the report shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunekit.evaluation.evaluation import Evaluation
from prunekit.evaluation.outputs import relative_errors

TENSOR_CORES = (8, 64)  # matrix sides should be multiples of the first, better of the second


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One evaluation a model, and how the figures were measured.

    Attributes:
        columns: the model's name → its evaluation; the dense model comes first, where it is one of
            them.
        macs_tokens: tokens of the forward pass whose multiply-adds were counted.
        protocols: corpus → how its perplexity was measured, in words.
    """

    columns: Mapping[str, Evaluation]
    macs_tokens: int
    protocols: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The report's keys, of which each holds a figure of every model."""
        first = next(iter(self.columns.values()))
        return {
            "models": list(self.columns),
            "parameters": {name: column.parameters for name, column in self.columns.items()},
            "weight_bytes": {name: column.weight_bytes for name, column in self.columns.items()},
            **(self._macs() if first.macs else {}),
            "perplexity": self._perplexity(),
            **({"tasks": self._tasks(first)} if first.tasks else {}),
            **({"layer_error": self._layer_errors()} if self._has_baseline() else {}),
            "warnings": self._width_warnings(),
            "samples": self._samples(first),
        }

    def _macs(self) -> dict[str, Any]:
        macs = {name: column.macs for name, column in self.columns.items() if column.macs}
        return {
            "macs": {name: counts.total for name, counts in macs.items()},
            "macs_protocol": f"one forward pass of {self.macs_tokens} tokens",
            "macs_by_module": {name: dict(counts.by_module) for name, counts in macs.items()},
        }

    def _perplexity(self) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for corpus, protocol in self.protocols.items():
            figures = {name: column.perplexity[corpus] for name, column in self.columns.items()}
            rows[corpus] = {**figures, "protocol": protocol}
        return rows

    def _tasks(self, first: Evaluation) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for task, score in first.tasks.items():
            own = {name: column.tasks[task] for name, column in self.columns.items()}
            figures = {
                name: {"value": score.value, "stderr": score.stderr} for name, score in own.items()
            }
            rows[task] = score.describe() | figures
        return rows

    def _has_baseline(self) -> bool:
        return next(iter(self.columns)) == "dense" and len(self.columns) > 1

    def _layer_errors(self) -> list[dict[str, Any]]:
        """How far each layer's output is from the dense model's; a row for each common layer."""
        dense, *others = self.columns.values()
        outputs = list(dense.outputs.values())
        errors = [relative_errors(outputs, list(other.outputs.values())) for other in others]
        names = list(self.columns)[1:]
        return [
            {"index": index, **dict(zip(names, row, strict=True))}
            for index, row in zip(dense.outputs, zip(*errors, strict=False), strict=False)
        ]

    def _width_warnings(self) -> list[str]:
        """A warning of matrices that GPUs run slowly, and that the first model did not have."""
        first, *others = self.columns.values()
        for side in TENSOR_CORES:
            if others:
                odd = others[0].odd_widths[side] - first.odd_widths[side]
            else:
                odd = first.odd_widths[side]
            if odd:
                slower = "much slower" if side == min(TENSOR_CORES) else "slower"
                return [
                    f"{len(odd)} matrices have a side that is no multiple of {side} "
                    f"({min(odd)}, …): GPUs run them {slower}; scope.width_multiple={side} keeps "
                    "to such widths"
                ]
        return []

    def _samples(self, first: Evaluation) -> list[dict[str, Any]]:
        return [
            {
                "prompt": sample.prompt,
                "mode": sample.mode,
                **{name: column.samples[i].text for name, column in self.columns.items()},
            }
            for i, sample in enumerate(first.samples)
        ]
