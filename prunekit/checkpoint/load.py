"""Load a model folder, dense or pruned, whose layers may all differ in width.

transformers stores such widths as `per_layer_config` but its stock models don't read it: the
skeleton is built from the dense values without allocating a weight and brought to `pruned_sizes`
(`prunekit.model.modeling_prunekit`), every parameter takes the shape it has in the file, and each
layer gets its own view of the config. A folder that only has per-layer values will do;
`extra_biases` in its config lists modules that were given a bias their class doesn't have.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.checkpoint.files import (
    MANY_LAYERS,
    check_config,
    count_tensors,
    locating_errors,
    read_config,
    weight_files,
    within,
)
from prunekit.checkpoint.manifest import check_manifest
from prunekit.checkpoint.quantized import (
    ask_to_dequantize,
    dequantizing,
    is_gguf,
    locate,
    make_plain,
    quantization_of,
)
from prunekit.errors import CheckpointError, first_line
from prunekit.model.build import (
    adopt,
    build_pruned,
    make_dense_config,
    needs_prunekit,
    refuse_config,
)
from prunekit.model.classes import find_class
from prunekit.model.compat import let_save_itself
from prunekit.model.record import RECORD, is_ours
from prunekit.runtime.console import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def from_pretrained(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
) -> PreTrainedModel:
    """Load a folder that `save_pretrained` wrote, or that of any model of transformers.

    The model is of the class that the folder names: a causal language model, an encoder with a
    classifier, an encoder and a decoder, a model that also sees or hears.

    Args:
        directory: a local folder; or a hub name or a GGUF file, for dense models.
        dtype: the type of the weights; the stored one by default.
        device: the device that the weights go to.
        attn_implementation: transformers' choice (sdpa, eager, …); its default for the model if
            None.
        trust_remote_code: allow transformers to run code that comes with the checkpoint.
        dequantize: make plain numbers of quantised weights, where transformers can; they are
            refused otherwise. A GGUF file needs no such consent.

    Raises:
        CheckpointError: the folder is missing or damaged: a file that can't be parsed, a tensor
            missing or left over; its weights are quantised; or transformers itself can't make its
            model.
    """
    folder = Path(directory)
    config, elements = check_folder(folder, trust_remote_code) if folder.is_dir() else ({}, None)
    model: Any
    if elements is None or not needs_prunekit(config):
        options = {
            "dtype": dtype or "auto",
            "attn_implementation": attn_implementation,
            "trust_remote_code": trust_remote_code,
        }
        if (method := quantization_of(config)) and not dequantize:
            raise CheckpointError(ask_to_dequantize(directory, method))
        model = _load_dense(directory, config, options, elements, dequantize)
        return model.to(device).eval()
    with within(elements):
        model = build_skeleton(folder, config, attn_implementation)
    tensors = _read_tensors(folder)
    if dtype is not None:
        tables = dict(model.named_buffers())  # rotary frequencies, say
        weights = {
            name for name, t in tensors.items() if t.is_floating_point() and name not in tables
        }
        tensors = {name: t.to(dtype) if name in weights else t for name, t in tensors.items()}
    with locating_errors(folder):
        adopt(model, tensors, exact=is_ours(config))
    model.config.dtype = dtype or model.config.dtype
    if is_ours(config):
        let_save_itself(model)
        setattr(model.config, RECORD, config[RECORD])
    return model.to(device).eval()


def check_folder(folder: Path, trust_remote_code: bool = False) -> tuple[dict[str, Any], int]:
    """A folder's config and how many elements its weights have; nothing is built yet.

    Raises:
        CheckpointError: the folder is not as it was saved, its small files are damaged, or its
            config asks for more than its weights can fill.
    """
    check_manifest(folder)
    if not (any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))):
        raise CheckpointError(
            f"{folder}: damaged weights: expected safetensors in the model folder, found none"
        )
    config = read_config(folder)
    tensors, elements = count_tensors(folder)
    check_config(folder / "config.json", config, tensors, trust_remote_code)
    return config, elements


def build_skeleton(
    folder: Path,
    config: dict[str, Any],
    attention: str | None = None,
    trust_remote_code: bool = False,
    stored: torch.dtype | None = None,
) -> PreTrainedModel:
    """Build the model that a folder describes, dense or pruned, in evaluation mode.

    Its parameters are on meta, its buffers hold numbers. Parameters have the
    shapes that their class gives them, until `adopt` replaces them by the tensors of the file.

    Args:
        folder: a model folder.
        config: the content of its `config.json`.
        attention: transformers' choice of an attention implementation.
        trust_remote_code: allow transformers to run code that comes with the checkpoint.
        stored: the type of the weights, for a config that doesn't say it.

    Raises:
        CheckpointError: the config makes no model.
    """
    with locating_errors(folder / "config.json"):
        if needs_prunekit(config):
            dense = make_dense_config(config)
        else:
            dense = _stock_config(folder, config, trust_remote_code)
        dense.dtype = dense.dtype or stored
        model = build_pruned(dense, config, attention, trust_remote_code)
    _generation_config(model, folder)
    return model.eval()


def _stock_config(
    folder: Path, config: Mapping[str, Any], trust_remote_code: bool
) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise refuse_config(config, error) from error


def _load_dense(
    directory: str | Path,
    config: Mapping[str, Any],
    options: Mapping[str, Any],
    elements: int | None,
    dequantize: bool,
) -> Any:
    """A model that transformers' own loader can build, of a folder, a GGUF file or from the hub."""
    from transformers.utils import logging

    is_here = Path(directory).exists()
    if not is_here and _looks_local(directory):
        raise CheckpointError(f"{directory}: no such model folder")
    try:
        logging.disable_progress_bar()
        with quiet("transformers"), nullcontext() if elements is None else within(elements):
            extra = dequantizing(directory, options) if dequantize or is_gguf(directory) else {}
            loaded: Any = _loader(directory, config).from_pretrained(
                use_safetensors=True,
                output_loading_info=True,
                **locate(directory),
                **options,
                **extra,
            )
    except Exception as error:
        if config:  # building the model alone may tell more: that transformers can't make it
            trusted = options["trust_remote_code"]
            build_skeleton(Path(directory), dict(config), trust_remote_code=trusted)
        where = "" if is_here else "no folder here, and from the hub "
        raise CheckpointError(
            f"{directory}: {where}can't load the model: {first_line(error)}"
        ) from error
    model, info = loaded
    misshapen = (key for key, *_ in info.get("mismatched_keys", ()))
    if missing := sorted([*info["missing_keys"], *misshapen]):
        raise CheckpointError(
            f"{directory}: damaged model folder: missing or misshapen {', '.join(missing[:3])}"
        )
    return make_plain(model, directory, dequantize or is_gguf(directory))


def _loader(directory: str | Path, config: Mapping[str, Any]) -> Any:
    """The class that loads a model: what `config.json` says of it, here or on the hub."""
    from transformers import PreTrainedConfig

    if not config and not is_gguf(directory):
        config = PreTrainedConfig.get_config_dict(str(directory))[0]
    return find_class(config)


def _looks_local(directory: str | Path) -> bool:
    """Whether a name can only mean a path, and not a model of the hub."""
    path = Path(directory)
    return path.is_absolute() or path.exists() or str(directory).startswith((".", "~"))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {
            name: _align(t) for file in weight_files(folder) for name, t in load_file(file).items()
        }
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: damaged weights: {first_line(error)}") from error


def _align(tensor: Tensor) -> Tensor:
    """The tensor, copied where its address is no multiple of 64 as torch's own addresses are.

    Tensors of a file lie at any address, and some kernels round otherwise where it is not aligned.
    """
    return tensor.clone() if tensor.data_ptr() % 64 else tensor


def _generation_config(model: PreTrainedModel, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(
                f"{folder / 'generation_config.json'}: damaged: {first_line(error)}"
            ) from error


def load_processor(directory: str | Path, trust_remote_code: bool = False) -> Any:
    """The processor of a model that also sees or hears; None where its folder has none.

    Raises:
        CheckpointError: it can't be loaded.
    """
    from transformers import AutoProcessor, ProcessorMixin

    folder = Path(directory)
    names = ("processor_config.json", "preprocessor_config.json")
    if folder.is_dir() and not any((folder / name).exists() for name in names):
        return None
    try:
        processor = AutoProcessor.from_pretrained(
            **locate(directory), trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise CheckpointError(
            f"{directory}: can't load the processor: {first_line(error)}"
        ) from error
    return processor if isinstance(processor, ProcessorMixin) else None


def load_tokenizer(
    directory: str | Path, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name.

    Raises:
        CheckpointError: the folder is damaged, or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = Path(directory)
    config = {}
    if folder.is_dir():
        check_manifest(folder, weights=False)
        config = read_config(folder)
    check_config(folder / "config.json", config, MANY_LAYERS, trust_remote_code)
    with locating_errors(folder / "config.json"):
        dense = make_dense_config(config) if needs_prunekit(config) else None
    try:
        return AutoTokenizer.from_pretrained(
            **locate(directory), config=dense, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise CheckpointError(
            f"{directory}: can't load the tokenizer: {first_line(error)}; a model without one is "
            "pruned by prunekit.prune, with batches of its own"
        ) from error
