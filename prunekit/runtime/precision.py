"""Computing in a wider floating-point type than a model is stored in, without touching its weights.

Every operator is handed its narrow inputs in the wide type, so that at most one weight at a time is
held wide. Nothing in the model changes, and so nothing has to be put back after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunekit.runtime.modes import restoring

T = TypeVar("T")


def is_narrower(dtype: torch.dtype, wide: torch.dtype) -> bool:
    """Whether a type is a floating-point type of fewer bits than another one."""
    return dtype.is_floating_point and torch.finfo(dtype).bits < torch.finfo(wide).bits


def widen(tree: T, wide: torch.dtype) -> T:
    """Nested lists, tuples and dicts with their narrower tensors cast, and a wide type for each
    narrower one that they name.
    """

    def widen_leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and is_narrower(value.dtype, wide):
            return value.to(wide)
        return wide if isinstance(value, torch.dtype) and is_narrower(value, wide) else value

    return tree_map(widen_leaf, tree)


def has_narrow(tree: Any, wide: torch.dtype) -> bool:
    """Whether nested lists, tuples and dicts hold or name what `widen` changes."""
    if isinstance(tree, Tensor):
        return is_narrower(tree.dtype, wide)
    if isinstance(tree, list | tuple):
        return any(has_narrow(value, wide) for value in tree)
    if isinstance(tree, dict):
        return any(has_narrow(value, wide) for value in tree.values())
    return isinstance(tree, torch.dtype) and is_narrower(tree, wide)


@contextmanager
def computing_in(wide: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let everything that runs in a `with` block compute in a type, unless its inputs are wider.

    Weights keep their type: each operator casts what it reads. What asks for a narrower type (a
    cast back to half precision) gets the wide one. Matrix products use no shorter mantissa
    (TensorFloat-32), and automatic mixed precision is off.

    Args:
        wide: float32 or float64.
        device: where the model runs.
    """
    with ExitStack() as stack:
        stack.enter_context(_full_mantissas())
        for kind in sorted({"cpu", device.type}):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_Widening(wide))
        yield


class _Widening(TorchDispatchMode):
    """Casts the inputs of every operator, and the types that it is asked for."""

    def __init__(self, wide: torch.dtype) -> None:
        super().__init__()
        self.wide = wide

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A view of a weight stays one; whoever computes with it casts it.
        if func.is_view or not has_narrow((args, kwargs), self.wide):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return self._write(func, args, kwargs)
        args, kwargs = widen((args, kwargs), self.wide)
        return func(*args, **kwargs)

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator that writes into arguments; a narrow one gets what was written, cast.

        Such a one can only be a buffer or a cache that was there before: nothing narrow is made.
        """
        written = [
            tensor
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value)
            if isinstance(tensor, Tensor) and is_narrower(tensor.dtype, self.wide)
        ]
        copies = {id(tensor): tensor.to(self.wide) for tensor in written}
        narrow = {id(copies[id(tensor)]): tensor for tensor in written}
        args = tree_map(lambda value: copies.get(id(value), value), args)
        args, kwargs = widen((args, kwargs), self.wide)
        outputs = func(*args, **kwargs)
        for tensor in written:
            tensor.copy_(copies[id(tensor)])
        return tree_map(lambda value: narrow.get(id(value), value), outputs)


def _full_mantissas() -> Any:
    """A context in which no backend shortens the mantissas of float32."""
    backends: Any = torch.backends
    places = [backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv]
    places += [backends.cudnn.conv, backends.cudnn.rnn]
    kept = [(place, place.fp32_precision) for place in places]

    def restore() -> None:
        for place, precision in kept:
            place.fp32_precision = precision

    for place in places:
        place.fp32_precision = "ieee"
    return restoring(restore)
