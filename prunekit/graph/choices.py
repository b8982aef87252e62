"""Routers and masks whose numbers decide about sizes, run as if every position were chosen.

Some experts are written as a loop over those that were chosen, each with the tokens that were sent
to it; some classifiers take the tokens that a mask of booleans chooses. How many there are depends
on numbers, and tracing has none. What is coupled to what does not depend on the choice: so the
graph is captured of the dense form, each expert on every token, with every token chosen.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_NONZERO = (torch.nonzero, Tensor.nonzero)
_SPLIT = (torch.split, Tensor.split)
_FLAT = (Tensor.squeeze, Tensor.flatten, torch.squeeze, torch.flatten)
_INDEX = (Tensor.__getitem__, Tensor.__setitem__)
_NUMBER = (Tensor.item, Tensor.__int__, Tensor.__index__, Tensor.__bool__)
_COUNT = (Tensor.any, torch.any, Tensor.sum, torch.sum, Tensor.count_nonzero, torch.count_nonzero)
_COMPARE = {
    getattr(Tensor, f"__{name}__"): getattr(operator, name)
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
}


class _Count:
    """A number that nothing tells; whatever computes with it raises TypeError."""


class EveryPositionChosen(TorchFunctionMode):
    """Lets `nonzero`, `where` and masks find every position, `split` take counts nothing tells.

    Positions that a loop goes over one by one are whole numbers in it.

    Args:
        rounds: how many of them a loop goes over; None: all. Experts that are stacked in one weight
            are seen in the first round, and a position may be none of an expert.

    `loops` tells whether there was such a loop.
    """

    def __init__(self, rounds: int | None = None) -> None:
        super().__init__()
        self._rounds = rounds
        self.loops = False
        # The id of a tensor → the tensor, and its numbers as nested lists.
        self._known: dict[int, tuple[Tensor, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NONZERO:
            return self._find(args[0], kwargs.get("as_tuple", False))
        if func is torch.where and len(args) == 1:
            return _positions(args[0])
        if func in _SPLIT and len(args) > 1 and _are_counts(args[1]):
            return _split_evenly(*args, **kwargs)
        if func in _INDEX and any(map(_is_mask, _places(args[1]))):
            places = [p for place in _places(args[1]) for p in _without_mask(place)]
            return func(args[0], tuple(places), *args[2:])
        if func in _COUNT and len(args) == 1 and not kwargs and _is_mask(args[0]):
            every = True if func in _COUNT[:2] else args[0].numel()
            return self._note(func(args[0]), every)
        if func is Tensor.__getitem__:
            return self._index(*args)
        if func is Tensor.item and id(args[0]) not in self._known:  # `tolist` asks so, too
            return _Count()
        if args and id(args[0]) in self._known:
            return self._compute(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _find(self, chosen: Tensor, as_tuple: bool) -> Any:
        """What `nonzero` gives where every position is chosen."""
        found = _positions(chosen)
        if as_tuple:
            return found
        table = torch.stack(found, 1)
        return self._note(table, [[i] for i in range(len(table))]) if chosen.ndim == 1 else table

    def _note(self, tensor: Tensor, numbers: Any) -> Tensor:
        self._known[id(tensor)] = (tensor, numbers)
        return tensor

    def _compute(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call a function on a tensor whose numbers are known; what it only moves stays known."""
        numbers = self._known[id(tensor)][1]
        if func in _NUMBER:
            number = _flatten(numbers)[0]
            return bool(number) if func is Tensor.__bool__ else number
        if func is Tensor.__format__:
            return format(_flatten(numbers)[0], *args)
        if func in _COMPARE and tensor.numel() == 1 and isinstance(args[0], int):
            return _COMPARE[func](_flatten(numbers)[0], args[0])
        result = func(tensor, *args, **kwargs)
        if func is Tensor.unbind and not any(args):
            self.loops = True
            rows = [self._note(row, own) for row, own in zip(result, numbers, strict=True)]
            return tuple(rows[: self._rounds])
        return self._note(result, _flatten(numbers)) if func in _FLAT else result

    def _index(self, tensor: Tensor, place: Any) -> Tensor:
        """Index a tensor, by a number where the tensor that stands for it is known."""
        if isinstance(place, tuple):
            return Tensor.__getitem__(tensor, tuple(map(self._number, place)))
        found = Tensor.__getitem__(tensor, self._number(place))
        if id(tensor) in self._known and type(place) is int:
            return self._note(found, self._known[id(tensor)][1][place])
        return found

    def _number(self, place: Any) -> Any:
        known = self._known.get(id(place))
        return place if known is None or place.ndim else known[1]


# The contexts in which a model may run without numbers, to be tried in this order.
WAYS: tuple[Callable[[], AbstractContextManager[Any]], ...] = (
    nullcontext,
    EveryPositionChosen,
    partial(EveryPositionChosen, rounds=1),
)


def _positions(chosen: Tensor) -> tuple[Tensor, ...]:
    """The indices of all positions, a tensor [number of positions] for each dim.

    They are computed from the tensor, so that the tracer knows what they depend on.
    """
    shape, count = chosen.shape, chosen.numel()
    places = torch.arange(count, device=chosen.device).reshape(shape) + 0 * chosen.long()
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return tuple(
        places.reshape(count) // stride % size for stride, size in zip(strides, shape, strict=True)
    )


def _places(index: Any) -> tuple[Any, ...]:
    """What stands between the brackets of `x[…]`, apart."""
    return index if isinstance(index, tuple) else (index,)


def _is_mask(place: Any) -> bool:
    return isinstance(place, Tensor) and place.dtype is torch.bool and place.ndim > 0


def _without_mask(place: Any) -> tuple[Any, ...]:
    """A part of an index; of a mask the indices of all its positions, one tensor for each dim."""
    return _positions(place) if _is_mask(place) else (place,)


def _are_counts(sizes: Any) -> bool:
    return isinstance(sizes, list) and all(isinstance(size, _Count) for size in sizes)


def _split_evenly(tensor: Tensor, counts: list[_Count], dim: int = 0) -> tuple[Tensor, ...]:
    """As many parts as there are counts, the first ones longer by one where it doesn't come out."""
    size, more = divmod(tensor.shape[dim], len(counts))
    return tensor.split([size + (part < more) for part in range(len(counts))], dim)


def _flatten(numbers: Any) -> list[int]:
    if not isinstance(numbers, list):
        return [numbers]
    return [number for part in numbers for number in _flatten(part)]
