"""Tensors cut along some dims, and the slices that put them together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """What a cut along one dim took from a tensor.

    Args:
        dim: the dim.
        keep: whether each position stayed [size], in host memory.
        values: the tensor at the positions that went.
    """

    dim: int
    keep: Tensor
    values: Tensor


def cut_tensor(tensor: Tensor, removed: Mapping[int, Tensor]) -> tuple[Tensor, list[Slice]]:
    """Cut a tensor; a new tensor, and what the cut along each dim took.

    Args:
        tensor: the tensor; it does not change.
        removed: dim → positions that go, each at least once.
    """
    slices = []
    for dim, positions in removed.items():
        keep = torch.ones(tensor.shape[dim], dtype=torch.bool)
        keep[positions] = False
        values = tensor.index_select(dim, _positions(~keep, tensor))
        slices.append(Slice(dim=dim, keep=keep, values=values))
        tensor = tensor.index_select(dim, _positions(keep, tensor))
    return tensor.contiguous(), slices


def join_slices(tensor: Tensor, slices: Sequence[Slice]) -> Tensor:
    """The tensor that `cut_tensor` made `tensor` and `slices` of, bit for bit; a new one."""
    for part in reversed(slices):
        shape = list(tensor.shape)
        shape[part.dim] = len(part.keep)
        whole = tensor.new_empty(shape)
        whole.index_copy_(part.dim, _positions(part.keep, tensor), tensor)
        tensor = whole.index_copy_(part.dim, _positions(~part.keep, tensor), part.values)
    return tensor


def _positions(mask: Tensor, beside: Tensor) -> Tensor:
    """Where `mask` [size] is true, on the device of another tensor."""
    return mask.nonzero().flatten().to(beside.device)


def way_to_rebuild(old: Tensor, new: Tensor, slices: Sequence[Slice]) -> Callable[[], Tensor]:
    """A function that returns `old`, or a tensor that nothing tells from it.

    It holds `old` itself only where this has what slices do not: a gradient, hooks, a class or a
    layout of its own, or memory that it shares with other tensors.

    Args:
        old: a parameter or buffer before the cut.
        new: the one that took its place.
        slices: what the cut took.
    """
    hooked = old._backward_hooks or getattr(old, "_post_accumulate_grad_hooks", None)
    is_plain = type(old) in (Tensor, nn.Parameter) and old.grad is None and not hooked
    is_alone = old.is_contiguous() and old.untyped_storage().nbytes() == old.nbytes
    if not (is_plain and is_alone):
        return lambda: old
    return partial(_rebuild, type(old), old.requires_grad, dict(old.__dict__), new, slices)


def _rebuild(
    kind: type[Tensor],
    requires_grad: bool,
    attributes: dict[str, object],
    new: Tensor,
    slices: Sequence[Slice],
) -> Tensor:
    whole = join_slices(new.detach(), slices)
    if kind is nn.Parameter:
        whole = nn.Parameter(whole, requires_grad=requires_grad)
    whole.__dict__.update(attributes)
    return whole
