"""Load a model folder, dense or pruned, whose layers may all differ in width.

transformers stores such widths as `per_layer_config` but its stock models don't read it: the skeleton is built from
the dense values without allocating a weight and brought to `pruned_sizes` (`prunekit.exports`), every parameter takes
the shape it has in the file, and each layer gets its own view of the config. A folder that only has per-layer values
will do; `extra_biases` in its config lists modules that were given a bias their class doesn't have.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checkpoint.files import (
    MANY_LAYERS,
    check_config,
    count_tensors,
    first_line,
    read_json,
    weight_files,
    within,
)
from prunekit.checkpoint.manifest import check_manifest
from prunekit.errors import CheckpointError
from prunekit.exports.folder import RECORD, is_our_code, is_ours
from prunekit.exports.modeling_prunekit import as_dense, fit, pruned_classes
from prunekit.sizes import fit_to_weight, layer_sizes, modules_of_layer, resize, set_per_layer


def from_pretrained(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model of a folder written by `save_pretrained`, or of any Hugging Face causal language model.

    Args:
        directory: a local folder; or a hub name, for dense models.
        dtype: of the weights; their stored one by default.
        device: where the weights go.
        attn_implementation: transformers' choice (sdpa, eager, …); its default for the model if None.
        trust_remote_code: allow transformers to run code that comes with the checkpoint.

    Raises:
        CheckpointError: the folder is missing or damaged: a file that can't be parsed, a tensor missing or left over.
    """
    folder = Path(directory)
    config, elements = checked(folder, trust_remote_code) if folder.is_dir() else ({}, None)
    if elements is None or not only_ours(config):
        return _load_dense(directory, dtype, device, attn_implementation, trust_remote_code, elements)
    with within(elements):
        model = skeleton_of(folder, config, attn_implementation)
    tensors = _read_tensors(folder)
    if dtype is not None:
        tables = dict(model.named_buffers())  # rotary frequencies, say
        weights = {name for name, t in tensors.items() if t.is_floating_point() and name not in tables}
        tensors = {name: t.to(dtype) if name in weights else t for name, t in tensors.items()}
    adopt(model, tensors, folder, exact=is_ours(config))
    model.config.dtype = dtype or model.config.dtype
    if is_ours(config):
        _save_by_itself(model, config[RECORD])
    return model.to(device).eval()


def _save_by_itself(model: Any, record: dict[str, Any]) -> None:
    """Let transformers' `save_pretrained` write the sizes along, which its own class of config would refuse."""
    model.config.__class__ = pruned_classes(model.config.model_type, __name__)[0]
    setattr(model.config, RECORD, record)


def checked(folder: Path, trust_remote_code: bool = False) -> tuple[dict[str, Any], int]:
    """A folder's config and how many elements its weights have; nothing is built yet.

    Raises:
        CheckpointError: the folder is not as it was saved, its small files are damaged, or its config asks for more
            than its weights can fill.
    """
    check_manifest(folder)
    if not (any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))):
        raise CheckpointError(f"{folder}: damaged weights: expected safetensors in the model folder, found none")
    config = read_config(folder)
    tensors, elements = count_tensors(folder)
    check_config(folder / "config.json", config, tensors, trust_remote_code)
    return config, elements


def skeleton_of(
    folder: Path,
    config: dict[str, Any],
    attention: str | None = None,
    trust_remote_code: bool = False,
    stored: torch.dtype | None = None,
) -> Any:
    """The model a folder describes, dense or pruned, in evaluation mode: parameters on meta, buffers real.

    Parameters have their class's shapes until `adopt` gives them the file's.

    Args:
        folder: a model folder.
        config: its `config.json`.
        attention: transformers' choice.
        trust_remote_code: allow transformers to run code that comes with the checkpoint.
        stored: the weights' type, for a config that doesn't say it.

    Raises:
        CheckpointError: the config makes no model.
    """
    dense = dense_config(folder, config) if only_ours(config) else _stock_config(folder, trust_remote_code)
    dense.dtype = dense.dtype or stored
    model = built(folder, dense, config, attention, trust_remote_code)
    _generation_config(model, folder)
    return model.eval()


def _stock_config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'}: damaged: {first_line(error)}") from error


def _load_dense(
    directory: str | Path,
    dtype: torch.dtype | None,
    device: Any,
    attention: str | None,
    trust_remote_code: bool,
    elements: int | None,
) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = Path(directory)
    if not folder.is_dir() and (folder.is_absolute() or str(directory).startswith((".", "~")) or folder.exists()):
        raise CheckpointError(f"{directory}: no such model folder")
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with nullcontext() if elements is None else within(elements):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype or "auto",
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:
        where = "" if folder.is_dir() else "no folder here, and from the hub "
        raise CheckpointError(f"{directory}: {where}can't load the model: {first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
    model, info = loaded
    if missing := [*info["missing_keys"], *(key for key, *_ in info.get("mismatched_keys", ()))]:
        raise CheckpointError(
            f"{directory}: damaged model folder: missing or misshapen {', '.join(sorted(missing)[:3])}"
        )
    return model.to(device).eval()


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`; CheckpointError where it is missing or damaged."""
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: expected a config.json in the model folder, found none")
    return read_json(folder / "config.json")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: _aligned(t) for file in weight_files(folder) for name, t in load_file(file).items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: damaged weights: {first_line(error)}") from error


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor as torch would have placed it: some kernels round otherwise where the file put it."""
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


def only_ours(config: dict[str, Any]) -> bool:
    """Whether a folder's config says what transformers' own loader can't build, or refuses to."""
    from transformers import AutoConfig

    if config.get("per_layer_config") or config.get("extra_biases") or is_ours(config):
        return True
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not (isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads):
        return False
    try:
        AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    except Exception:
        return True
    return False


def _overrides(folder: Path, config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    try:
        return {int(layer): dict(values) for layer, values in (config.get("per_layer_config") or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: damaged: per_layer_config: {error}") from error


def dense_config(folder: Path, config: dict[str, Any]) -> Any:
    """The config of a pruned folder without its per-layer values, which transformers' classes stumble over.

    Nor with what is about the folder and not about the model. A hidden size that the number of heads doesn't divide is
    no mistake here: channels were cut.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    values = {key: value for key, value in config.items() if key not in ("per_layer_config", "model_type", RECORD)}
    validators: list[Any] = []
    every: list[Any] = []
    try:
        if any(map(is_our_code, dict(values.get("auto_map") or {}).values())):
            del values["auto_map"]
        validators = getattr(CONFIG_MAPPING[config["model_type"]], "__class_validators__", [])
        every[:] = validators
        validators[:] = [validator for validator in every if validator.__name__ != "validate_architecture"]
        return AutoConfig.for_model(config["model_type"], **values)
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'}: damaged: {first_line(error)}") from error
    finally:
        validators[:] = every


def built(
    folder: Path, dense: Any, config: dict[str, Any], attention: str | None, trust_remote_code: bool = False
) -> Any:
    """The model with its parameters on meta, every layer's attributes and config at their pruned sizes."""
    overrides = _overrides(folder, config)
    try:
        model = unfitted(dense, attention, trust_remote_code)
        if is_ours(config):
            fit(model, config[RECORD])
        else:
            for path in getattr(dense, "extra_biases", None) or ():  # of consumers whose class has none
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


def tied_places(model: nn.Module) -> list[list[tuple[nn.Module, str, str]]]:
    """Of every parameter all its places, the first one first: (module, attribute, name)."""
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                places.setdefault(id(parameter), []).append((module, attribute, name))
    return list(places.values())


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
        _check_alike(places[0][0]._parameters[places[0][1]], tensors[name], f"{folder}: {name}", exact)
        parameter = nn.Parameter(tensors[name], requires_grad=tensors[name].is_floating_point())
        for module, attribute, _ in places:
            module._parameters[attribute] = parameter
            fit_to_weight(module)
    for name, buffer in list(model.named_buffers()):
        if name in tensors:
            path, _, attribute = name.rpartition(".")
            holder = model.get_submodule(path)
            _check_alike(buffer, tensors[name], f"{folder}: {name}", exact)
            if tensors[name].shape != buffer.shape:  # cut, so it can't be computed from the config any more
                holder._non_persistent_buffers_set.discard(attribute)
            setattr(holder, attribute, tensors[name])
            used.add(name)
    if left := sorted(set(tensors) - used):
        raise CheckpointError(f"{folder}: damaged weights: no place for {', '.join(left[:3])}")


def _check_alike(old: Tensor | None, new: Tensor, where: str, exact: bool) -> None:
    assert old is not None
    if old.is_floating_point() and not new.is_floating_point():
        raise CheckpointError(f"{where}: damaged weights: expected floating point numbers, got {new.dtype}")
    if exact and old.shape != new.shape:
        raise CheckpointError(f"{where}: expected shape {tuple(old.shape)}, got {tuple(new.shape)}")


def _generation_config(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(f"{folder / 'generation_config.json'}: damaged: {first_line(error)}") from error


def load_tokenizer(directory: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub name."""
    from transformers import AutoTokenizer

    folder = Path(directory)
    config = {}
    if folder.is_dir():
        check_manifest(folder, weights=False)
        config = read_config(folder)
    check_config(folder / "config.json", config, MANY_LAYERS, trust_remote_code)
    dense = dense_config(folder, config) if only_ours(config) else None
    try:
        return AutoTokenizer.from_pretrained(directory, config=dense, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{directory}: can't load the tokenizer: {first_line(error)}") from error
