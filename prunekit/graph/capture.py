"""Capture a module's forward pass as an ATen graph without running or copying a weight."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from prunekit.errors import TraceError


def meta_copy(model: nn.Module) -> nn.Module:
    """The module's structure with parameters and buffers on the meta device; ties are kept, no weight is copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def without_cache(model: nn.Module, inputs: Any) -> Any:
    """Keyword arguments of a forward call that keeps no key-value cache, where the model would keep one by default."""
    keeps = getattr(getattr(model, "config", None), "use_cache", False)
    return {"use_cache": False, **inputs} if keeps and isinstance(inputs, Mapping) else inputs


def capture(model: nn.Module, example_inputs: Mapping[str, Any] | tuple[Any, ...]) -> ExportedProgram:
    """The ATen graph of `model(*example_inputs)` or `model(**example_inputs)`, in evaluation mode.

    Raises:
        TraceError: torch.export can't follow the module (data-dependent control flow, say).
    """
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
    skeleton = meta_copy(model).eval()
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    try:
        return torch.export.export(skeleton, args, kwargs, strict=False)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TraceError(
            f"{type(model).__name__}: torch.export can't capture its forward pass: {first_line}"
        ) from error
