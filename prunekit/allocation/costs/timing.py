"""Run a module alone, on the arguments it gets inside its model, and time it."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.runtime.modes import evaluating

Inputs = Mapping[str, Any] | tuple[Any, ...]
_MOMENT = 5e-3  # a timing takes this many seconds or more: quicker calls are repeated


@dataclass(frozen=True)
class Call:
    """The arguments a module was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, module: nn.Module) -> Any:
        """What a module answers to them."""
        return module(*self.args, **self.kwargs)


@torch.inference_mode()
def record(model: nn.Module, places: set[str], example: Inputs) -> dict[str, Call]:
    """What the modules at these places are (first) called with in a forward pass on the example."""
    whole = Call((), example) if isinstance(example, Mapping) else Call(example, {})
    calls = {"": whole}

    def note(place: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(place, Call(args, kwargs))

    handles = [
        model.get_submodule(place).register_forward_pre_hook(partial(note, place), with_kwargs=True)
        for place in places - {""}
    ]
    try:
        whole(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def moved(example: Inputs, device: torch.device) -> Any:
    """The example's tensors on a device."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), example)


def filled(skeleton: nn.Module, dense: nn.Module) -> nn.Module:
    """A copy of a (cut) meta module, on the dense one's device and with its first numbers."""
    memo: dict[int, Any] = {}
    for (_, empty), (_, full) in zip(skeleton.named_modules(), dense.named_modules(), strict=True):
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(empty, kind).items():
                if tensor is not None:
                    memo.setdefault(id(tensor), _first(getattr(full, name), tensor))
        for name, value in vars(full).items():
            if isinstance(value, Tensor) and id(vars(empty)[name]) not in memo:
                memo[id(vars(empty)[name])] = value.detach().clone()
    return copy.deepcopy(skeleton, memo)


def _first(full: Tensor, cut: Tensor) -> Tensor:
    part = full.detach()[tuple(slice(size) for size in cut.shape)].clone(
        memory_format=torch.contiguous_format
    )
    return (
        nn.Parameter(part, requires_grad=cut.requires_grad)
        if isinstance(cut, nn.Parameter)
        else part
    )


@torch.inference_mode()
def median_seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median over `repeats` of the seconds a run takes, after two to warm up."""
    run()
    once = _elapsed(run, 1, device)
    calls = min(max(math.ceil(_MOMENT / max(once, 1e-9)), 1), 100)
    return statistics.median(_elapsed(run, calls, device) / calls for _ in range(repeats))


@torch.inference_mode()
def timed(model: nn.Module, example: Inputs, repeats: int = 9) -> float:
    """Median seconds of one forward pass on the example, in evaluation mode."""
    whole = Call((), example) if isinstance(example, Mapping) else Call(example, {})
    with evaluating(model):
        return median_seconds(lambda: whole(model), next(model.parameters()).device, repeats)


def _elapsed(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
