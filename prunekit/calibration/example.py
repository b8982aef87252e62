"""The hidden states of a model's example, layer by layer, where layers are loaded one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.calls import LayerCall, record_calls
from prunekit.calibration.store import Store
from prunekit.model.stack import hidden_of_output


@dataclass
class ExampleStates:
    """What goes into the layers for an example of a few tokens.

    `calls`: of each layer. `hidden`: the states [samples, tokens, size] before the layer in turn.
    """

    layers: nn.ModuleList
    calls: Sequence[LayerCall]
    hidden: Tensor

    @classmethod
    def record(
        cls, model: nn.Module, path: str, inputs: Any, device: torch.device
    ) -> ExampleStates | None:
        """Record the calls of the layers; None where they can't be run one by one.

        Args:
            model: a model whose weights outside of the layers are loaded.
            path: of the list of layers.
            inputs: keyword arguments of a forward pass.
            device: where the layers run.
        """
        layers = model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        if not isinstance(inputs, Mapping):
            return None
        there = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), dict(inputs))
        recording = record_calls(model, layers, [(0, there)], Store(device, budget=float("inf")))
        if recording is None:
            return None
        return cls(layers, recording.calls[0], recording.hidden[0].get())

    @torch.no_grad()
    def run(self, layer: int) -> Tensor:
        """The output of the layer in turn, as it is by now."""
        # A copy, because some layers write to the hidden states that they are given.
        output = hidden_of_output(self.calls[layer].make(self.layers[layer], self.hidden.clone()))
        assert output is not None
        return output

    def advance(self, layer: int) -> None:
        """Bring the hidden states behind the layer in turn."""
        self.hidden = self.run(layer)
