"""Several processes on one job, which share the calibration set.

They are started by `torchrun --nproc-per-node N -m prunekit …`; alone, every function does nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.runtime.torchrun import count_launched

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=1)  # the first process evaluates while the others wait


def world_size() -> int:
    """Number of processes; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, during a `with` block; without torchrun, nothing.

    Args:
        device: the device of this process; GPUs talk by NCCL, all else by Gloo.
    """
    if count_launched() < 2 or world_size() > 1:
        yield
        return
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where collectives of objects put their bytes
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_part(items: Sequence[T]) -> list[T]:
    """The items this process works on: every N-th."""
    return list(items[rank() :: world_size()])


def add_up(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_all(item: T) -> list[T]:
    """The items of all processes, in the order of their numbers."""
    if world_size() == 1:
        return [item]
    items: list[Any] = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_first(item: T) -> T:
    """What the first process has, in all of them."""
    items = [item]
    if world_size() > 1:
        dist.broadcast_object_list(items, src=0)
    return items[0]


def in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """The items that all processes got from `own_part`, in the order that they had before.

    Args:
        parts: what `gather_all` returned of a list that each process made of its items.
    """
    count = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def hold_everywhere(holds: bool, device: torch.device) -> bool:
    """Whether something holds in all processes, for decisions that they must take alike."""
    if world_size() == 1:
        return holds  # the device need not be waited for
    return add_up(torch.tensor([float(not holds)], device=device)).item() == 0


@contextmanager
def together() -> Iterator[None]:
    """A block that each process runs on its part: a user's error in one of them is raised in all.

    Otherwise the others would wait for ever for the process that failed.
    """
    error: PrunekitError | None = None
    try:
        yield
    except PrunekitError as own:
        error = own
    if world_size() > 1:
        errors: list[PrunekitError | None] = [None] * world_size()
        dist.all_gather_object(errors, error)
        error = next((other for other in errors if other), None)
    if error is not None:
        raise error
