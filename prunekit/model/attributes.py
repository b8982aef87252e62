"""Attributes of modules that repeat a size: brought in line when the size changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from prunekit.model.names import (
    ATTENTION_WIDTHS,
    NORM_WIDTHS,
    RECURRENT_NAMES,
    SYNONYMS,
    synonyms,
)

Sizes = dict[str, tuple[int, int]]  # quantity → (old size, new size)
Setter = Callable[[Any, str, Any], None]  # sets an attribute, as `setattr` does
# Attributes that repeat a dimension of the module's own weight: name → dimension.
_WEIGHT_DIMS = {
    "out_features": 0,
    "in_features": 1,
    "embedding_dim": 1,
    "num_embeddings": 0,
    "num_features": 0,
    "nf": 1,
    "nx": 0,
}


def resize(
    targets: Iterable[Any], sizes: Sizes, setter: Setter = setattr, *, owner: bool = False
) -> None:
    """Bring attributes that repeat a changed size in line, where their value is the old one.

    Args:
        targets: modules or configs.
        sizes: quantity → (old size, new size).
        setter: sets an attribute.
        owner: whether the targets own weights of what changes: a norm over all heads, say.
    """
    for target in targets:
        for quantity, (old, new) in sizes.items():
            names = _attribute_names(target, quantity)
            if owner and quantity == "attention_width":
                names = (*names, *NORM_WIDTHS)
            _resize_one(target, names, old, new, setter)


def _resize_one(target: Any, names: Sequence[str], old: int, new: int, setter: Setter) -> None:
    for name in names:
        value = target.__dict__.get(name)
        if type(value) is int and value == old:
            setter(target, name, new)
        elif isinstance(value, list | tuple) and tuple(value) == (old,):
            setter(target, name, (new,))


def _attribute_names(target: Any, quantity: str) -> tuple[str, ...]:
    """What a module or config may call a quantity.

    Inside attention, words such as `hidden_size` mean the width of all heads together, and not
    what they mean elsewhere.
    """
    names = synonyms(quantity)
    if isinstance(target, nn.Module):
        names = (*names, *RECURRENT_NAMES.get(quantity, ()))
    if isinstance(target, nn.Module) and _is_attention(target):
        if quantity == "attention_width":
            return (*names, *ATTENTION_WIDTHS)
        if quantity in ("hidden_size", "intermediate_size"):
            return tuple(name for name in names if name not in ATTENTION_WIDTHS)
    return names


def _is_attention(module: nn.Module) -> bool:
    """Whether a module has a number of heads, and holds no stack of layers that have one."""
    names = (*SYNONYMS["num_attention_heads"], *RECURRENT_NAMES["num_attention_heads"])
    counts = any(name in module.__dict__ for name in names)
    return counts and not any(isinstance(child, nn.ModuleList) for child in module.children())


def fit_to_weight(module: nn.Module, setter: Setter = setattr) -> None:
    """Set the attributes of a module that repeat the shape of its weight (`in_features`, …).

    The weight may be that of a module it wraps (the `base_layer` of an adapter).
    """
    weight = module._parameters.get("weight")
    if weight is None and "in_features" in module.__dict__:
        weight = getattr(module, "weight", None)
    if weight is None:
        return
    for name, dim in _WEIGHT_DIMS.items():
        if name in module.__dict__ and dim < weight.ndim:
            setter(module, name, weight.shape[dim])
    if "normalized_shape" in module.__dict__:
        setter(module, "normalized_shape", tuple(weight.shape))
