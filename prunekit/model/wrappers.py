"""Models as people bring them: wrapped, spread, offloaded, quantised. Unwrapped, or refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from prunekit.errors import TraceError

# What torch puts around a model → the submodule that is the model.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",  # of torch.compile
}
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and `torch.compile`.

    Raises:
        TraceError: its weights are not here as plain tensors: they are spread over processes,
            offloaded, or quantised; or it holds modules that are compiled, TorchScript, sparse, or
            without shapes yet. The message says what to bring instead.
    """
    while (inside := _WRAPPERS.get(type(model).__name__)) in model._modules:
        model = model.get_submodule(str(inside))
    name = type(model).__name__
    if _is_sharded(model):
        raise TraceError(
            f"{name}: its weights are spread over processes (FSDP, DTensor): expected all of them "
            "in this one; load the model without sharding, or gather it first"
        )
    if _is_offloaded(model):
        raise TraceError(
            f"{name}: some of its weights are offloaded by accelerate: expected all of them "
            "loaded; load it without device_map, or give its folder to prunekit.prune_checkpoint, "
            'with overrides=["memory.stream=true"] where memory is short'
        )
    if (method := find_quantization(model)) is not None:
        raise TraceError(
            f"{name}: its weights are quantised ({method}): expected floating-point weights; load "
            "it by prunekit.from_pretrained(…, dequantize=True), or call model.dequantize() before"
        )
    for path, module in model.named_modules():
        if problem := _find_problem(module):
            raise TraceError(f"{path or name}: {problem}")
    return model


def _find_problem(module: nn.Module) -> str | None:
    """Why a module can't be traced or cut; None: nothing. Modules in it are not looked into."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript: expected the module that it was made of"
    forward = vars(module).get("forward")
    calls = (forward, getattr(module, "_compiled_call_impl", None))
    compiled = any(hasattr(call, "_torchdynamo_orig_callable") for call in calls)
    if compiled or type(module).__name__ == "OptimizedModule":
        return "it is compiled: expected the model as it was before; compile it when it is pruned"
    for parameter in module.parameters(recurse=False):
        if isinstance(parameter, UninitializedParameter):
            return "its weights have no shape yet: expected a model that was called once"
        if parameter.layout is not torch.strided:
            return "its weights are sparse: expected dense ones (`weight.to_dense()`)"
        if parameter.is_inference():
            return "its weights were made in inference mode: expected it made outside of that"
    return None


def find_quantization(model: nn.Module) -> str | None:
    """How the weights of a model are quantised; None where they are plain numbers."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        method = getattr(quantizer.quantization_config, "quant_method", None)
        return str(getattr(method, "value", method))
    for parameter in model.parameters():
        tensor_class: Any = type(parameter)
        if tensor_class.dequantize is not Tensor.dequantize:
            return str(tensor_class.__module__.partition(".")[0])
        if not parameter.is_complex() and _is_narrow(parameter.dtype):
            return str(parameter.dtype).removeprefix("torch.")
    return None


def without_hooks(model: nn.Module) -> nn.Module:
    """Take accelerate's hooks off a copy of a model, in place; they move tensors to devices.

    The hooks of the model itself stay: they still move what runs through it.
    """
    for module in model.modules():
        if vars(module).pop("_hf_hook", None) is not None:
            vars(module)["forward"] = vars(module).pop("_old_forward")
    return model


def _is_sharded(model: nn.Module) -> bool:
    classes = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    tensors = {type(parameter).__name__ for parameter in model.parameters()}
    return not classes.isdisjoint(_SHARDED) or "DTensor" in tensors


def _is_offloaded(model: nn.Module) -> bool:
    """Whether a hook of accelerate loads weights only while their module runs."""
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    parts = [part for hook in hooks for part in getattr(hook, "hooks", (hook,))]
    return any(getattr(part, "offload", False) for part in parts)


def _is_narrow(dtype: torch.dtype) -> bool:
    """Whether numbers of a type stand for others by scales: integers, floats of one byte."""
    return not dtype.is_floating_point or dtype.itemsize == 1
