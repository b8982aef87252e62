"""LoRA adapters on a model's linears, with peft: W' = W + (α / r) · B A, attached, merged or taken
off in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.errors import ConfigError
from prunekit.recovery.settings import Recovery
from prunekit.runtime.console import say


def linears(model: Any) -> dict[str, nn.Module]:
    """Every linear (`nn.Linear`, transformers' `Conv1D`) that holds weights, but the output head,
    by its name.
    """
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    return {
        name: module
        for name, module in found.items()
        if module is not head and module.weight.numel()
    }


def target_names(
    model: nn.Module, kinds: Sequence[str], modules: Mapping[str, Collection[str]] | None
) -> list[str]:
    """The names of the linears that `kinds` ("all", "mlp", "attention") mean, in the model's order.

    Args:
        model: the model.
        kinds: which linears.
        modules: "mlp" and "attention" → names of their linears; where None, those under a module
            whose class is called an attention are the attention's, all others the mlp's.

    Raises:
        ConfigError: the model has no such linear.
    """
    known = list(linears(model))
    sorts = _by_owner(model, known) if modules is None else modules
    wanted = {name for kind in kinds for name in (known if kind == "all" else sorts.get(kind, ()))}
    if not (found := [name for name in known if name in wanted]):
        raise ConfigError(
            f"recovery.targets={','.join(kinds)}: the model has no such linear among its {len(known)}"
        )
    return found


def attach(model: Any, names: Sequence[str], recovery: Recovery, base: str) -> Any:
    """Put fresh adapters on the linears of these names, in place; peft's wrapper of the model comes
    back.

    Only the adapters are trainable then; they are float32. `base` is what their config names as the
    model below.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=recovery.rank,
        lora_alpha=recovery.alpha,  # type: ignore[arg-type]
        lora_dropout=recovery.dropout,
        target_modules=list(names),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    stacked = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    if stacked:
        say(
            f"recovery: {len(stacked)} stacked weights ({stacked[0]}, …) belong to no linear: they get no adapter"
        )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a deprecated name; that some linears' weights lie the other way round
        wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapters into the weights in float32 (rounded once, to the weights' own type) and
    take them off.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()  # float32 adapters add up with half-precision weights in float32
    return detach(model)


def detach(model: nn.Module) -> nn.Module:
    """Take the adapters off a model recovered with `recovery.merge=false`: the pruned model as it
    was, in place.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        model.set_submodule(name, layer.get_base_layer())
    if layers:
        del model.peft_config
    return model


def save(wrapped: Any, folder: Path) -> None:
    """Write the adapters in peft's format: safetensors and a config."""
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """Put back what training changes besides weights: modes, which parameters are trainable,
    `use_cache`, wrappers.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    cache = getattr(getattr(model, "config", None), "use_cache", None)
    wrappers = {
        key: vars(model).get(key) for key in ("forward", "_original_forward")
    }  # accelerate's, for bf16
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, modes[""])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable.get(name, False))
            parameter.grad = None
        for key, value in wrappers.items():
            vars(model).pop(key, None)
            if value is not None:
                setattr(model, key, value)
        if cache is not None:
            model.config.use_cache = cache


def _by_owner(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    owners = tuple(
        f"{n}."
        for n, module in model.named_modules()
        if n and "attention" in type(module).__name__.lower()
    )
    attention = [name for name in names if name.startswith(owners)]
    return {"attention": attention, "mlp": [name for name in names if name not in attention]}
