"""Build a model from its config without weights: dense as its class makes it, then brought to its
pruned sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import CheckpointError, first_line
from prunekit.model.modeling_prunekit import as_dense, fit
from prunekit.model.record import RECORD, is_our_code, is_ours
from prunekit.model.sizes import fit_to_weight, layer_sizes, modules_of_layer, resize, set_per_layer
from prunekit.model.ties import tied_places


def only_ours(config: dict[str, Any]) -> bool:
    """Whether a folder's config says what transformers' own loader can't build, or refuses to."""
    from transformers import AutoConfig

    if config.get("per_layer_config") or config.get("extra_biases") or is_ours(config):
        return True
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads):
        return False
    try:
        AutoConfig.for_model(
            config["model_type"], **{k: v for k, v in config.items() if k != "model_type"}
        )
    except Exception:
        return True
    return False


def _overrides(folder: Path, config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    try:
        return {
            int(layer): dict(values)
            for layer, values in (config.get("per_layer_config") or {}).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: damaged: per_layer_config: {error}"
        ) from error


def dense_config(folder: Path, config: dict[str, Any]) -> Any:
    """The config of a pruned folder without its per-layer values, which transformers' classes
    stumble over.

    Nor with what is about the folder and not about the model. A hidden size that the number of
    heads doesn't divide is no mistake here: channels were cut.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    values = {
        key: value
        for key, value in config.items()
        if key not in ("per_layer_config", "model_type", RECORD)
    }
    validators: list[Any] = []
    every: list[Any] = []
    try:
        if any(map(is_our_code, dict(values.get("auto_map") or {}).values())):
            del values["auto_map"]
        validators = getattr(CONFIG_MAPPING[config["model_type"]], "__class_validators__", [])
        every[:] = validators
        validators[:] = [
            validator for validator in every if validator.__name__ != "validate_architecture"
        ]
        return AutoConfig.for_model(config["model_type"], **values)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'}: damaged: {first_line(error)}") from error
    finally:
        validators[:] = every


def built(
    folder: Path,
    dense: Any,
    config: dict[str, Any],
    attention: str | None,
    trust_remote_code: bool = False,
) -> Any:
    """The model with its parameters on meta, every layer's attributes and config at their pruned
    sizes.
    """
    overrides = _overrides(folder, config)
    try:
        model = unfitted(dense, attention, trust_remote_code)
        if is_ours(config):
            fit(model, config[RECORD])
        else:
            for path in (
                getattr(dense, "extra_biases", None) or ()
            ):  # of consumers whose class has none
                module = model.get_submodule(path)
                module.bias = nn.Parameter(torch.empty(len(module.weight), device="meta"))
            for layer, values in overrides.items():
                for sizes in layer_sizes(dense, values):
                    resize(modules_of_layer(model, layer), sizes)
        if overrides:
            set_per_layer(model, overrides)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'}: damaged: {first_line(error)}") from error
    return model


def unfitted(dense: Any, attention: str | None = None, trust_remote_code: bool = False) -> Any:
    """The dense model a config was made from, its parameters on meta."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False), as_dense(dense):
        model: Any = AutoModelForCausalLM.from_config(
            dense, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model


def adopt(model: nn.Module, tensors: dict[str, Tensor], folder: Path, exact: bool = False) -> None:
    """Give every parameter its tensor of the file; tied ones stay tied.

    Args:
        model: gets them.
        tensors: by name.
        folder: they are of.
        exact: refuse other shapes than the model has.

    Raises:
        CheckpointError: a tensor is missing, left over, or no such numbers as the model has.
    """
    used: set[str] = set()
    for places in tied_places(model):
        name = next((name for *_, name in places if name in tensors), None)
        if name is None:
            raise CheckpointError(f"{folder}: damaged weights: {places[0][2]} is missing")
        used.update(name for *_, name in places)
        _check_alike(
            places[0][0]._parameters[places[0][1]], tensors[name], f"{folder}: {name}", exact
        )
        parameter = nn.Parameter(tensors[name], requires_grad=tensors[name].is_floating_point())
        for module, attribute, _ in places:
            module._parameters[attribute] = parameter
            fit_to_weight(module)
    for name, buffer in list(model.named_buffers()):
        if name in tensors:
            path, _, attribute = name.rpartition(".")
            holder = model.get_submodule(path)
            _check_alike(buffer, tensors[name], f"{folder}: {name}", exact)
            if (
                tensors[name].shape != buffer.shape
            ):  # cut, so it can't be computed from the config any more
                holder._non_persistent_buffers_set.discard(attribute)
            setattr(holder, attribute, tensors[name])
            used.add(name)
    if left := sorted(set(tensors) - used):
        raise CheckpointError(f"{folder}: damaged weights: no place for {', '.join(left[:3])}")


def _check_alike(old: Tensor | None, new: Tensor, where: str, exact: bool) -> None:
    assert old is not None
    if old.is_floating_point() and not new.is_floating_point():
        raise CheckpointError(
            f"{where}: damaged weights: expected floating point numbers, got {new.dtype}"
        )
    if exact and old.shape != new.shape:
        raise CheckpointError(f"{where}: expected shape {tuple(old.shape)}, got {tuple(new.shape)}")
