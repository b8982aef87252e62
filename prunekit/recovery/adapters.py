r"""LoRA adapters on a model's linears, with peft, put on and taken off in place.

$$W' = W + \frac{\alpha}{r} B A$$

with W [out, in] of a linear, A [r, in] and B [out, r] of its adapter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prunekit.errors import ConfigError
from prunekit.model.updates import Factors
from prunekit.recovery.settings import Recovery
from prunekit.runtime.console import quiet, say
from prunekit.runtime.modes import keep_attributes, restoring

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name → linear (`nn.Linear`, transformers' `Conv1D`), in the model's order.

    The output head is left out, and so are linears that pruning left without weights.
    """
    from transformers.pytorch_utils import Conv1D

    of_model: Any = getattr(model, "get_output_embeddings", None)
    head = of_model() if of_model else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and module.weight.numel()
    }


def target_names(
    model: nn.Module, kinds: Sequence[str], modules: Mapping[str, Collection[str]] | None
) -> list[str]:
    """The names of the linears that `kinds` mean, in the model's order.

    Args:
        model: the model to train.
        kinds: "all", "mlp" or "attention".
        modules: "mlp" and "attention" → names of their linears; where None, linears under a module
            whose class is called an attention are the attention's, all others the mlp's.

    Raises:
        ConfigError: the model has no such linear.
    """
    known = list(find_linears(model))
    by_kind = {**(_sort_by_owner(model, known) if modules is None else modules), "all": known}
    wanted = {name for kind in kinds for name in by_kind.get(kind, ())}
    names = [name for name in known if name in wanted]
    if not names:
        raise ConfigError(
            f"recovery.targets={','.join(kinds)}: the model has no such linear among its "
            f"{len(known)}"
        )
    return names


def attach(model: PreTrainedModel, names: Sequence[str], recovery: Recovery, base: str) -> Any:
    """Put fresh adapters on the linears of these names, in place, and return peft's wrapper.

    Only the adapters are trainable then; they are float32.

    Args:
        model: the model to train.
        names: of linears.
        recovery: its `rank`, `alpha` and `dropout` are used.
        base: what the adapters' config names as the model below them.
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
            f"recovery: {len(stacked)} stacked weights ({stacked[0]}, …) belong to no linear: "
            "they get no adapter"
        )
    # peft warns of a deprecated name, and where only some linears are a `Conv1D`, whose weights lie
    # the other way round: peft corrects them itself.
    with quiet():
        wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


@torch.no_grad()
def go_on(wrapped: nn.Module, updates: Mapping[str, Factors]) -> None:
    """Have fresh adapters begin with these updates, of their rank at most, instead of zero.

    The rows of A that are left over stay random, and the columns of B zero.
    """
    for name, (up, down) in updates.items():
        layer: Any = wrapped.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        own_up, own_down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        own_up[:, : len(down)] = up.to(own_up) / layer.scaling["default"]
        own_down[: len(down)] = down.to(own_down)


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapters into the weights and take them off, in place.

    The sum is computed in float32 and rounded once, to the type of the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()  # float32 adapters and half-precision weights add up to float32
    return detach(model)


def detach(model: nn.Module) -> nn.Module:
    """Take the adapters off a model recovered with `recovery.merge=false`, in place.

    What stays is the pruned model as it was.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        model.set_submodule(name, layer.get_base_layer())
    if layers:
        del model.peft_config
    return model


def save(wrapped: PeftModel | nn.Module, folder: Path) -> None:
    """Write the adapters in peft's format: safetensors and a config."""
    write: Any = wrapped.save_pretrained
    write(str(folder), save_embedding_layers=False)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back all that training changes in a model beside its weights, after a `with` block.

    These are the modes, the parameters that are trainable, `use_cache`, and the wrappers that
    accelerate puts around `forward` for bfloat16. Unlike in `prunekit.runtime.modes`, modules and
    parameters are known by their names, because others may have taken their places; new ones are
    frozen, and in the mode of the model.
    """
    modes = {name: module.training for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config: Any = getattr(model, "config", None)
    configs = [] if config is None else [config]

    def restore() -> None:
        for name, module in model.named_modules():
            module.training = modes.get(name, modes[""])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable.get(name, False))
            parameter.grad = None

    wrappers = [keep_attributes([model], key) for key in ("forward", "_original_forward")]
    with restoring(*wrappers, keep_attributes(configs, "use_cache"), restore):
        yield


def _sort_by_owner(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Sort names of linears by their owners: "attention" for attention modules, else "mlp"."""
    owners = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if name and "attention" in type(module).__name__.lower()
    )
    attention = [name for name in names if name.startswith(owners)]
    return {"attention": attention, "mlp": [name for name in names if name not in attention]}
