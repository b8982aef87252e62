"""Everything that is measured on one model: one column of the report."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from prunekit.evaluation.cost import Macs
from prunekit.evaluation.generation import Continuation
from prunekit.evaluation.task_scores import TaskScore


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one model. A figure that was not asked for is empty or None.

    Attributes:
        parameters: how many numbers the weights hold; tied weights count once.
        weight_bytes: bytes of the weights in the type in which they are stored.
        perplexity: corpus → perplexity.
        tasks: lm-eval's task, or group of tasks → score.
        macs: multiply-adds of one forward pass.
        samples: continuations of the prompts, each prompt in each mode.
        outputs: layer's index → what the layer leaves of the residual stream, [N, T, hidden] in
            host memory.
        odd_widths: divisor → names of the matrices with a side that it does not divide.
    """

    parameters: int
    weight_bytes: int
    perplexity: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    macs: Macs | None = None
    samples: tuple[Continuation, ...] = ()
    outputs: Mapping[int, Tensor] = field(default_factory=dict, repr=False)
    odd_widths: Mapping[int, frozenset[str]] = field(default_factory=dict)

    def without_layers(self, layers: Collection[int]) -> Evaluation:
        """The same evaluation without the outputs of some layers, which another model lacks."""
        kept = {index: output for index, output in self.outputs.items() if index not in layers}
        return replace(self, outputs=kept)

    def to_json(self) -> dict[str, Any]:
        """All figures in JSON's types; the outputs of the layers are left out."""
        return {
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "perplexity": dict(self.perplexity),
            "tasks": {name: score.to_json() for name, score in self.tasks.items()},
            "macs": self.macs.to_json() if self.macs else None,
            "samples": [sample.to_json() for sample in self.samples],
            "odd_widths": {str(side): sorted(names) for side, names in self.odd_widths.items()},
        }
