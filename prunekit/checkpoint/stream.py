"""Models larger than memory: a skeleton on meta, and shards that its weights are read from."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checkpoint.compose import Parts, compose, number_of
from prunekit.checkpoint.files import located, within
from prunekit.checkpoint.load import build_skeleton, check_folder
from prunekit.checkpoint.shards import Composed, Shards, Stored
from prunekit.checkpoint.weights import persistent_buffers
from prunekit.errors import CheckpointError
from prunekit.model.build import adopt, needs_prunekit
from prunekit.model.record import is_ours
from prunekit.model.ties import parameter_places

_OBSOLETE = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")  # tables that older checkpoints hold


def open_streamed(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[Any, Shards]:
    """A local model folder, dense or pruned, without its weights.

    Args:
        directory: a local folder.
        dtype: the parameters' once they are loaded; their stored one by default.
        trust_remote_code: allow transformers to run code that comes with the checkpoint.
        attn_implementation: transformers' choice.

    Returns:
        The model in evaluation mode, every parameter on meta in the file's shape and every buffer
        real; and the shards, by the model's names.

    Raises:
        CheckpointError: the folder is missing or damaged, a tensor is missing, left over or of
            another shape.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{directory}: expected a local model folder, found none")
    config, elements = check_folder(folder, trust_remote_code)
    shards = Shards.of_folder(folder)
    with within(elements):
        model = build_skeleton(folder, config, attn_implementation, trust_remote_code, shards.dtype)
    dense = not needs_prunekit(config)
    shards = _by_names_of(model, shards, dense)
    if dense:
        _check_shapes(model, shards)
    _take_shapes(model, shards, dtype, is_ours(config))
    model.config.dtype = dtype or model.config.dtype
    return model, shards


def _by_names_of(model: Any, shards: Shards, dense: bool) -> Shards:
    """The shards by the model's names: those of its class before a renaming, or of a body without
    its prefix.

    A parameter that is stored in parts is one entry. Tables that no class wants any more are left
    out. A pruned model may store tables that its class would compute: they were cut.
    """
    from transformers.core_model_loading import dot_natural_key

    buffers = persistent_buffers(model) if dense else dict(model.named_buffers())
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **buffers}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    ignored = [*_OBSOLETE, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    rename = _renaming(model)
    entries: dict[str, Stored | Composed] = {}
    parts: dict[str, tuple[Any, Parts]] = {}  # of a tensor: what makes it, of what
    for name in sorted(shards, key=dot_natural_key):
        new, converter, part = (name, None, ("", 0)) if name in tensors else rename(name)
        new = prefix + new if new not in tensors and prefix + new in tensors else new
        if new in tensors and converter is not None:
            parts.setdefault(new, (converter, {}))[1][part] = name
        elif new in tensors or not any(re.search(pattern, new) for pattern in ignored):
            entries[new if converter is None else name] = shards[name]
    for new, (converter, stored) in parts.items():
        entries[new] = compose(new, tensors[new].shape, converter, stored, shards)
    return Shards(shards.where, entries)


def _renaming(model: Any) -> Callable[[str], tuple[str, Any, tuple[str, int]]]:
    """What transformers calls otherwise than the checkpoints it loads: a name there → the model's;
    and where the tensor is only a part of that, the converter, the part's pattern and its number.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]

    def rename(name: str) -> tuple[str, Any, tuple[str, int]]:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in converters:
            new, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return new, converter, (pattern, number_of(pattern, name))
        return name, None, ("", 0)

    return rename


def _check_shapes(model: nn.Module, shards: Shards) -> None:
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if name in shards and shards[name].shape != tensor.shape:
            shape = tuple(tensor.shape)
            raise CheckpointError(
                f"{shards[name].file}: {name}: expected shape {shape}, got {shards[name].shape}"
            )
    for places in parameter_places(model).values():
        stored = [place.name for place in places if place.name in shards]
        if different := [name for name in stored[1:] if not shards.equal(stored[0], name)]:
            raise CheckpointError(
                f"{shards.where}: {stored[0]} and {different[0]} differ, but its config ties them: "
                "such a checkpoint must be loaded whole"
            )


def _take_shapes(model: nn.Module, shards: Shards, dtype: torch.dtype | None, exact: bool) -> None:
    def on_meta(name: str) -> Tensor:
        own = dtype if shards[name].dtype.is_floating_point else None
        return torch.empty(shards[name].shape, dtype=own or shards[name].dtype, device="meta")

    with located(shards.where):
        adopt(model, {name: on_meta(name) for name in shards}, exact)
    for path, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                name = f"{path}.{attribute}".lstrip(".")
                module._buffers[attribute] = shards.read([name])[name]
