"""Size, arithmetic and widths of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunekit.model.compat import experts_computed
from prunekit.model.inputs import input_device
from prunekit.model.modeling_prunekit import place_in_stack
from prunekit.model.stack import module_lists
from prunekit.runtime.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Size:
    """Numbers in a model's weights, and bytes that they take where they are stored."""

    parameters: int
    weight_bytes: int


def measure_size(model: nn.Module, dtype: torch.dtype | None = None) -> Size:
    """The size of a model that is stored in `dtype`, or in the types its weights have now.

    Tied weights count once.
    """
    weights = list(model.parameters())
    return Size(
        parameters=sum(weight.numel() for weight in weights),
        weight_bytes=sum(weight.numel() * (dtype or weight.dtype).itemsize for weight in weights),
    )


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Multiply-adds of one forward pass: of all, and of each kind of module.

    A kind is a module's path with the layer's number left out ("model.layers.*.mlp"). The kinds are
    the parts that each layer, or the model outside of its layers, is made of.
    """

    total: int
    by_module: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The counts in JSON's types."""
        return {"total": self.total, "by_module": dict(self.by_module)}


@torch.inference_mode()
def count_macs(
    model: nn.Module, tokens: int = 64, device: torch.device | str | None = None
) -> Macs:
    """Multiply-adds of one forward pass of `tokens` tokens of one sequence.

    torch's `FlopCounterMode` counts, two operations a multiply-add, with every product spelled out:
    attention is two products of full width, causal or not, and the experts that a mixture chooses
    are computed one by one.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.zeros(1, tokens, dtype=torch.long, device=device or input_device(model))
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        experts_computed(model, "eager"),
        evaluating(model),
    ):
        model(input_ids=ids, use_cache=False)
    operations = counter.get_flop_counts()
    kinds: dict[str, int] = {}
    for path, _ in model.named_modules():
        if (kind := _kind_of(model, path)) is not None:
            own = sum(operations.get(f"{type(model).__name__}.{path}", {}).values())
            kinds[kind] = kinds.get(kind, 0) + own // 2
    return Macs(
        total=counter.get_total_flops() // 2,
        by_module={kind: count for kind, count in kinds.items() if count},
    )


def _kind_of(model: nn.Module, path: str) -> str | None:
    """The kind that a module is counted as; None where it is counted as a part of another one.

    These modules are counted: the children of layers; and modules outside of layers that hold no
    layers and lie in no other module of this sort.
    """
    if not path:
        return None
    parent, _, name = path.rpartition(".")
    if (place := place_in_stack(model, path)) is not None:
        stack, index = place
        return f"{stack}.*.{name}" if parent == f"{stack}.{index}" else None
    if _holds_layers(model, path):
        return None
    return path if not parent or _holds_layers(model, parent) else None


def _holds_layers(model: nn.Module, path: str) -> bool:
    return bool(module_lists(model.get_submodule(path)))


def odd_widths(model: nn.Module, divisor: int = 8) -> frozenset[str]:
    """Names of the matrices with a side that `divisor` does not divide.

    Tensor cores run matrices fast whose sides are multiples of 8, and faster with multiples of 64.
    """
    return frozenset(
        name
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and any(side % divisor for side in weight.shape[-2:])
    )
