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
_MOMENT = 5e-3  # seconds that a timing takes at least: quicker calls are repeated


@dataclass(frozen=True)
class Arguments:
    """The arguments a module was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, module: nn.Module) -> Any:
        """Call a module with these arguments; the value that it returns."""
        return module(*self.args, **self.kwargs)


@torch.inference_mode()
def record_calls(model: nn.Module, places: set[str], example: Inputs) -> dict[str, Arguments]:
    """The arguments of the first call of each of these modules in a forward pass on the example.

    `places` are paths of modules; the answer also has the model itself, at the empty path.
    """
    whole = Arguments((), example) if isinstance(example, Mapping) else Arguments(example, {})
    calls = {"": whole}

    def note(place: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(place, Arguments(args, kwargs))

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


def move_inputs(example: Inputs, device: torch.device) -> Inputs:
    """The example with its tensors, however nested, on a device."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), example)


def fill_skeleton(skeleton: nn.Module, dense: nn.Module) -> nn.Module:
    """A copy of a (cut) meta module with numbers, on the device of the dense module.

    Each tensor holds the first rows, columns, … of the dense one: seconds depend on shapes alone.
    """
    memo: dict[int, Any] = {}
    for (_, empty), (_, full) in zip(skeleton.named_modules(), dense.named_modules(), strict=True):
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(empty, kind).items():
                if tensor is not None:
                    memo.setdefault(id(tensor), _take_first(getattr(full, name), tensor))
        for name, value in vars(full).items():
            if isinstance(value, Tensor) and id(vars(empty)[name]) not in memo:
                memo[id(vars(empty)[name])] = value.detach().clone()
    return copy.deepcopy(skeleton, memo)


def _take_first(full: Tensor, cut: Tensor) -> Tensor:
    """The corner of a dense tensor that has the shape of its cut counterpart."""
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
    """Median over `repeats` timings of the seconds that a run takes, after two runs to warm up."""
    run()
    once = _time_calls(run, 1, device)
    calls = min(max(math.ceil(_MOMENT / max(once, 1e-9)), 1), 100)
    return statistics.median(_time_calls(run, calls, device) / calls for _ in range(repeats))


@torch.inference_mode()
def time_model(model: nn.Module, example: Inputs, repeats: int = 9) -> float:
    """Median seconds of one forward pass on the example, in evaluation mode."""
    whole = Arguments((), example) if isinstance(example, Mapping) else Arguments(example, {})
    with evaluating(model):
        return median_seconds(lambda: whole(model), next(model.parameters()).device, repeats)


def _time_calls(run: Callable[[], Any], calls: int, device: torch.device) -> float:
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
