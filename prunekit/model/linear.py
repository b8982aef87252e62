"""Linear modules: which of the modules that hold a weight compute its product."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from prunekit.model.ties import Place


def is_stock(module: nn.Module) -> bool:
    """Whether a module computes only x Wᵀ + b (Linear), or x W + b (transformers' Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    return "forward" not in vars(module) and type(module).forward in (
        nn.Linear.forward,
        Conv1D.forward,
    )


def places_of_product(places: Sequence[Place]) -> list[Place]:
    """The places of a weight in stock linear modules, each module once; else the canonical one.

    Args:
        places: all places of the parameter, the canonical one first.
    """
    stock: dict[nn.Module, Place] = {}
    for place in places:
        if place.attribute == "weight" and is_stock(place.module):
            stock.setdefault(place.module, place)
    return list(stock.values()) or [places[0]]
