"""Models larger than memory: a skeleton on meta, and shards that its weights are read from."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.checkpoint.compose import Parts, compose, read_number
from prunekit.checkpoint.files import locating_errors, within
from prunekit.checkpoint.load import build_skeleton, check_folder
from prunekit.checkpoint.quantized import quantization_of
from prunekit.checkpoint.shards import Composed, Shards, Stored
from prunekit.checkpoint.weights import persistent_buffers
from prunekit.errors import CheckpointError
from prunekit.model.build import adopt, needs_prunekit
from prunekit.model.record import is_ours
from prunekit.model.ties import parameter_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tables that older checkpoints hold and no class reads.
_OBSOLETE = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


def open_streamed(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, Shards]:
    """A local model folder, dense or pruned, without its weights.

    Args:
        directory: a local folder.
        dtype: the type of the parameters once they are loaded; the stored one by default.
        trust_remote_code: allow transformers to run code that comes with the checkpoint.
        attn_implementation: transformers' choice (sdpa, eager, …).

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
    if method := quantization_of(config):
        raise CheckpointError(
            f"{directory}: its weights are quantised ({method}): not read layer by layer; expected "
            "memory.stream=false"
        )
    shards = Shards.of_folder(folder)
    with within(elements):
        model = build_skeleton(folder, config, attn_implementation, trust_remote_code, shards.dtype)
    dense = not needs_prunekit(config)
    shards = _by_names_of(model, shards, dense)
    if missing := _find_computed(model, shards):
        raise CheckpointError(
            f"{directory}: {missing} is in no file, as its class computes it: not read layer by "
            "layer; expected memory.stream=false"
        )
    if dense:
        _check_shapes(model, shards)
    _take_shapes(model, shards, dtype, is_ours(config))
    model.config.dtype = dtype or model.config.dtype
    return model, shards


@dataclass(frozen=True, kw_only=True)
class _Key:
    """The place of a checkpoint's tensor in the model.

    Args:
        name: the name of the model's tensor.
        converter: transformers' converter, where the checkpoint's tensor is only a part of the
            model's tensor.
        part: the pattern and the number of the part, where there is a converter.
    """

    name: str
    converter: Any = None
    part: tuple[str, int] = ("", 0)


def _by_names_of(model: PreTrainedModel, shards: Shards, dense: bool) -> Shards:
    """The shards by the names of the model's tensors.

    Checkpoints may hold names of before a renaming in transformers, or those of a body without its
    prefix. A parameter that is stored in parts becomes one entry. Tables that no
    class reads any more are left out. A pruned model may store tables that its class would compute,
    because they were cut.
    """
    from transformers.core_model_loading import dot_natural_key

    buffers = persistent_buffers(model) if dense else dict(model.named_buffers())
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **buffers}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    ignored = [*_OBSOLETE, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    find_key = _key_finder(model)
    entries: dict[str, Stored | Composed] = {}
    parts: dict[str, tuple[Any, Parts]] = {}  # the model's name → the converter, and its parts
    for name in sorted(shards, key=dot_natural_key):
        key = _Key(name=name) if name in tensors else find_key(name)
        prefixed = key.name not in tensors and prefix + key.name in tensors
        new = prefix + key.name if prefixed else key.name
        if new in tensors and key.converter is not None:
            parts.setdefault(new, (key.converter, {}))[1][key.part] = name
        elif new in tensors or not any(re.search(pattern, new) for pattern in ignored):
            entries[new if key.converter is None else name] = shards[name]
    for new, (converter, stored) in parts.items():
        entries[new] = compose(new, tensors[new].shape, converter, stored, shards)
    return Shards(shards.where, entries)


def _key_finder(model: PreTrainedModel) -> Callable[[str], _Key]:
    """A function from the name of a checkpoint's tensor to its place in the model.

    transformers describes which of a model's tensors have other names in checkpoints.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if not isinstance(change, WeightConverter)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]

    def find_key(name: str) -> _Key:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in converters:
            new, pattern = converter.rename_source_key(name)
            if pattern is not None:
                part = (pattern, read_number(pattern, name))
                return _Key(name=new, converter=converter, part=part)
        return _Key(name=name)

    return find_key


def _find_computed(model: PreTrainedModel, shards: Shards) -> str | None:
    """A parameter that no file holds, as the model's class leaves it out (Marian's positions)."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_save", None) or ())]
    for places in parameter_places(model).values():
        names = [place.name for place in places]
        if shards.entries.keys().isdisjoint(names) and any(
            re.search(p, names[0]) for p in patterns
        ):
            return names[0]
    return None


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

    with locating_errors(shards.where):
        adopt(model, {name: on_meta(name) for name in shards}, exact)
    for path, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                name = f"{path}.{attribute}".lstrip(".")
                module._buffers[attribute] = shards.read([name])[name]
