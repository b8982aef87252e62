"""Low-rank updates of the weights that are trained beside the gates (Compresso, arXiv 2310.05015).

y = W x + s B A x for the linear modules of all layers, x as the gates leave it; A begins at random,
B at 0, so that training begins with the dense model. Afterwards W ← W + s B A. The layers are those
of peft, which are in the model while gates are trained; their A and B are float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from prunekit.errors import ConfigError
from prunekit.gates.places import Adapted, Gate
from prunekit.gates.updates import Factors, Updates
from prunekit.model.linear import is_stock
from prunekit.model.stack import all_layers
from prunekit.model.ties import tensor_places
from prunekit.model.updates import is_transposed
from prunekit.runtime.console import quiet
from prunekit.runtime.seeds import make_generator

_SCALE = 2.0  # s: alpha / rank, as the recovery's default 16 / 8
_NAME = "default"  # peft's, of the only adapter


class Adapters(Updates):
    """Low-rank updates of the linear modules in a model's layers, each weight once.

    Args:
        model: the model; its weights are not touched.
        rank: of the updates, at least 1.
        seed: of A.

    Raises:
        ConfigError: no layer has a linear module.
    """

    def __init__(self, model: nn.Module, rank: int, seed: int) -> None:
        self.model, names = model, _find_linears(model)
        if not names:
            raise ConfigError(
                "importance.train.rank: expected linear modules in the layers, "
                f"{type(model).__name__} has none; rank=0 leaves weights frozen"
            )
        bases = {name: model.get_submodule(name) for name in names}
        _inject(model, names, rank, any(map(is_transposed, bases.values())))
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        self.layers, self.parameters, self._adapted = layers, {}, list[Adapted]()
        for name, layer in layers.items():
            down, up = layer.lora_A[_NAME], layer.lora_B[_NAME]
            generator = make_generator(seed, f"{name}.weight")
            drawn = torch.rand(down.weight.shape, generator=generator) * 2 - 1
            down.weight.data = (drawn / math.sqrt(drawn.shape[1])).to(down.weight.device)
            up.weight.data = up.weight.data.float()
            self.parameters |= {f"{name}.down": down.weight, f"{name}.up": up.weight}
            self._adapted.append(Adapted(base=bases[name], around=layer, down=down, up=up))
            layer.enable_adapters(False)

    def follow(self, gates: Sequence[Gate]) -> list[Gate]:
        """The gates, on the inputs or the rows and columns of adapters too."""
        adapted = {own.base: own for own in self._adapted}
        return [moved for gate in gates for moved in gate.follow(adapted)]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside the `with` block the modules return what their updated weights would."""
        self._enable(True)
        try:
            yield
        finally:
            self._enable(False)

    def _enable(self, on: bool) -> None:
        for layer in self.layers.values():
            layer.enable_adapters(on)

    def remove(self) -> None:
        """Give the model its own modules back."""
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer.get_base_layer())
        model: Any = self.model
        if hasattr(model, "peft_config"):
            del model.peft_config

    def learned(self) -> dict[str, Factors]:
        """Name of a weight → s B [out, r] and A [r, in], on the CPU."""
        parameters = {name: own.detach().cpu() for name, own in self.parameters.items()}
        return {
            f"{name}.weight": (
                _SCALE * parameters[f"{name}.up"],
                parameters[f"{name}.down"].clone(),
            )
            for name in self.layers
        }


def _find_linears(model: nn.Module) -> list[str]:
    """The names of stock linear modules in all layers whose weights are shared with no other."""
    inside = {module for layer in all_layers(model) for module in layer.modules()}
    names = []
    for name, places in tensor_places(model).items():
        module = places[0].module
        linear = len(places) == 1 and places[0].attribute == "weight" and is_stock(module)
        if linear and module in inside:
            names.append(name.removesuffix(".weight"))
    return names


def _inject(model: nn.Module, names: Sequence[str], rank: int, transposed: bool) -> None:
    """Put peft's layers around the modules of exactly these names; no random number is used up."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=_SCALE * rank,  # type: ignore[arg-type]
        target_modules="|".join(map(re.escape, names)),
        fan_in_fan_out=transposed,
    )
    device = next(model.parameters()).device
    forked = torch.random.fork_rng(devices=[device]) if device.type == "cuda" else nullcontext()
    # peft warns where only some linears are a `Conv1D`, and corrects them itself.
    with torch.random.fork_rng(devices=[]), forked, quiet():
        inject_adapter_in_model(config, model)
