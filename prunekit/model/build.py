"""Build a model from its config without weights: dense first, then brought to its pruned sizes.

The config of a folder is not trusted: any error is a CheckpointError. Its message does not name the
folder, which the functions here don't know; callers put it in front, by `locating_errors` of
`prunekit.checkpoint.files`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.errors import CheckpointError, first_line
from prunekit.model.attributes import fit_to_weight, resize
from prunekit.model.classes import find_class
from prunekit.model.compat import make_config
from prunekit.model.modeling_prunekit import as_dense, fit, has_own_layers
from prunekit.model.names import synonyms
from prunekit.model.per_layer import Overrides, layer_sizes, set_per_layer
from prunekit.model.record import RECORD, has_our_code, is_ours
from prunekit.model.stack import modules_of_layer
from prunekit.model.ties import parameter_places

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def needs_prunekit(config: Mapping[str, Any]) -> bool:
    """Whether a folder's config has sizes that transformers' own loader can't or won't build."""
    from transformers import AutoConfig

    per_layer = config.get("per_layer_config") and not has_own_layers(config)
    if per_layer or config.get("extra_biases") or is_ours(config):
        return True
    hidden, heads = (
        next((config[name] for name in synonyms(quantity) if config.get(name) is not None), None)
        for quantity in ("hidden_size", "num_attention_heads")
    )
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads):
        return False
    # Some classes take a head count that doesn't divide the hidden size, others refuse it.
    values = {key: value for key, value in config.items() if key != "model_type"}
    try:
        AutoConfig.for_model(config["model_type"], **values)
    except Exception:
        return True
    return False


def make_dense_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """Make the config of a pruned folder's dense model: without the values of single layers.

    transformers' classes can't be built with these, but for those that the dense model had. Entries
    about the folder instead of the model are left out as well. A hidden size that the number of
    heads doesn't divide is no mistake here: channels were cut.

    Raises:
        CheckpointError: an unknown model type, or values that its class can't take.
    """
    left_out = ["model_type", RECORD]
    if not has_own_layers(config):
        left_out.append("per_layer_config")
    values = {key: value for key, value in config.items() if key not in left_out}
    dense = config.get("dense_sizes")
    if (
        isinstance(dense, Mapping) and "per_layer_config" in dense
    ):  # empty: not what it is by default
        values["per_layer_config"] = dense["per_layer_config"]
    try:
        if has_our_code(values):
            del values["auto_map"]
        return make_config(config["model_type"], values)
    except Exception as error:
        raise _describe_damage(error) from error


def build_pruned(
    dense: PretrainedConfig,
    config: Mapping[str, Any],
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a folder, its parameters on meta, every layer at its pruned sizes.

    Args:
        dense: what `make_dense_config` makes of the folder's config.
        config: the folder's `config.json`.
        attention: transformers' choice of an attention implementation.
        trust_remote_code: allow transformers to run code that comes with the checkpoint.

    Raises:
        CheckpointError: the config makes no model.
    """
    overrides = _read_overrides(config)
    try:
        model = build_dense(dense, attention, trust_remote_code)
        if is_ours(config):
            fit(model, config[RECORD])
        else:
            _add_biases(model, getattr(dense, "extra_biases", None) or ())
            for layer, values in overrides.items():
                if any(value == 0 and value is not False for value in values.values()):
                    raise ValueError(
                        f"per_layer_config: layer {layer} lacks a sublayer: expected {RECORD}"
                    )
                for sizes in layer_sizes(dense, values):
                    resize(modules_of_layer(model, layer), sizes)
        if overrides:
            set_per_layer(model, overrides)
    except Exception as error:
        damaged = needs_prunekit(config)
        raise (_describe_damage(error) if damaged else refuse_config(config, error)) from error
    return model


def _read_overrides(config: Mapping[str, Any]) -> Overrides:
    stated = {} if has_own_layers(config) else config.get("per_layer_config") or {}
    try:
        return {int(layer): dict(values) for layer, values in stated.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged: per_layer_config: {error}") from error


def _add_biases(model: nn.Module, paths: list[str] | tuple[str, ...]) -> None:
    """Give modules a bias that their class doesn't make (a compensation added it), on meta."""
    for path in paths:
        module = model.get_submodule(path)
        module.bias = nn.Parameter(torch.empty(len(module.weight), device="meta"))  # type: ignore[arg-type]


def _describe_damage(error: Exception) -> CheckpointError:
    return CheckpointError(f"damaged: {first_line(error)}")


def refuse_config(config: Mapping[str, Any], error: Exception) -> CheckpointError:
    """What is said of a dense model's config of which transformers itself makes no model."""
    from transformers import __version__

    reason = first_line(error).rstrip(".:")
    return CheckpointError(
        f"transformers {__version__} itself can't make this model of type "
        f"{config.get('model_type')}: {reason}; take a version that can, or a config as it wants it"
    )


def build_dense(
    config: PretrainedConfig, attention: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The dense model that a pruned model's config was made from, its parameters on meta.

    It is of the class that the config's `architectures` name, if that is one of transformers'.
    """
    from accelerate import init_empty_weights

    known = {"architectures": config.architectures, "model_type": config.model_type}
    builder = find_class({**known, "auto_map": getattr(config, "auto_map", None)})
    with init_empty_weights(include_buffers=False), as_dense(config):
        model: PreTrainedModel
        if hasattr(builder, "from_config"):  # an auto class
            model = builder.from_config(
                config, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
        else:
            model = builder._from_config(config, attn_implementation=attention)
    model.tie_weights()
    return model


def adopt(model: nn.Module, tensors: Mapping[str, Tensor], exact: bool = False) -> None:
    """Give every parameter its tensor of the file; tied ones stay tied, frozen ones frozen.

    Buffers that are among the tensors are replaced as well.

    Args:
        model: a model whose parameters are on meta; changed in place.
        tensors: name → tensor; of a tied parameter one of its names will do.
        exact: refuse other shapes than the model has.

    Raises:
        CheckpointError: a tensor is missing, left over, or no such numbers as the model has.
    """
    used: set[str] = set()
    for places in parameter_places(model).values():
        name = next((place.name for place in places if place.name in tensors), None)
        if name is None:
            raise CheckpointError(f"damaged weights: {places[0].name} is missing")
        used.update(place.name for place in places)
        tensor, (module, attribute, _) = tensors[name], places[0]
        old = module._parameters[attribute]
        _check_alike(old, tensor, name, exact)
        wanted = (old is None or old.requires_grad) and tensor.is_floating_point()
        parameter = nn.Parameter(tensor, requires_grad=wanted)
        for module, attribute, _ in places:
            module._parameters[attribute] = parameter
            fit_to_weight(module)
    for name, buffer in list(model.named_buffers()):
        if name in tensors:
            _check_alike(buffer, tensors[name], name, exact)
            _replace_buffer(model, name, tensors[name])
            used.add(name)
    if left := sorted(set(tensors) - used):
        raise CheckpointError(f"damaged weights: no place for {', '.join(left[:3])}")


def _replace_buffer(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a buffer; if it has another shape, it is part of the state dict from now on.

    It was cut then, and can't be computed from the config any more.
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if tensor.shape != model.get_buffer(name).shape:
        module._non_persistent_buffers_set.discard(attribute)
    setattr(module, attribute, tensor)


def _check_alike(old: Tensor | None, new: Tensor, name: str, exact: bool) -> None:
    assert old is not None
    if old.is_floating_point() and not new.is_floating_point():
        raise CheckpointError(
            f"{name}: damaged weights: expected floating point numbers, got {new.dtype}"
        )
    if exact and old.shape != new.shape:
        raise CheckpointError(f"{name}: expected shape {tuple(old.shape)}, got {tuple(new.shape)}")
