"""Low-rank updates of the weights that are trained beside the gates (Compresso, arXiv 2310.05015).

y = W x + s B A x for the linear modules of all layers, x as the gates leave it; A begins at random,
B at 0, so that training begins with the dense model. Afterwards W ← W + s B A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.taps import is_stock, is_transposed
from prunekit.model.stack import all_layers
from prunekit.model.ties import tensor_places
from prunekit.runtime.numbers import at_least_float32
from prunekit.runtime.seeds import make_generator

_SCALE = 2.0  # s: alpha / rank, as the recovery's default 16 / 8


class Adapters:
    """Low-rank updates of the linear modules in a model's layers, each weight once.

    None of them with a rank of 0.

    Args:
        model: the model; its weights are not touched.
        rank: of the updates.
        seed: of A.

    Attributes:
        parameters: the leaves A [r, in] and B [out, r] by name, on the devices of the weights.
    """

    def __init__(self, model: nn.Module, rank: int, seed: int) -> None:
        inside = {module for layer in all_layers(model) for module in layer.modules()}
        self.modules: dict[str, nn.Module] = {}
        self.parameters: dict[str, Tensor] = {}
        for name, places in tensor_places(model).items() if rank else ():
            module = places[0].module
            linear = len(places) == 1 and places[0].attribute == "weight" and is_stock(module)
            if not linear or module not in inside:
                continue
            self.modules[name] = module
            weight = at_least_float32(model.get_parameter(name).detach())
            outputs, inputs = weight.T.shape if is_transposed(module) else weight.shape
            generator = make_generator(seed, name)
            drawn = torch.rand(min(rank, inputs), inputs, generator=generator) * 2 - 1
            self.parameters[f"{name}.down"] = (drawn / math.sqrt(inputs)).to(weight)
            self.parameters[f"{name}.up"] = weight.new_zeros(outputs, len(drawn))
        for parameter in self.parameters.values():
            parameter.requires_grad_()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the `with` block the modules return what their updated weights would."""
        with ExitStack() as hooks:
            for name, module in self.modules.items():
                add = partial(self._add, name)
                hooks.callback(module.register_forward_hook(add).remove)
            yield

    def _add(self, name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        down, up = self.parameters[f"{name}.down"], self.parameters[f"{name}.up"]
        x = args[0]
        return output + _SCALE * (x @ down.to(x).T) @ up.to(x).T

    def updates(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name of a weight → s B [out, r] and A [r, in], on the CPU."""
        return {
            name: (
                _SCALE * self.parameters[f"{name}.up"].detach().cpu(),
                self.parameters[f"{name}.down"].detach().cpu().clone(),
            )
            for name in self.modules
        }


@torch.no_grad()
def merge(model: nn.Module, updates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Add updates s B A to the weights of these names, in place."""
    for name, (up, down) in updates.items():
        weight = model.get_parameter(name).data
        wide = at_least_float32(weight)
        delta = up.to(wide) @ down.to(wide)
        transposed = is_transposed(model.get_submodule(name.rpartition(".")[0]))
        weight.copy_(wide + (delta.T if transposed else delta))
