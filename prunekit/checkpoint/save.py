"""Save a model folder: config (with `per_layer_config`), safetensors, manifest, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from prunekit.checkpoint.describe import describe
from prunekit.checkpoint.files import read_config
from prunekit.checkpoint.manifest import write_manifest
from prunekit.errors import CheckpointError
from prunekit.model.build import needs_prunekit
from prunekit.model.compat import unvalidated, written_whole
from prunekit.model.verify import check_loadable, required_record
from prunekit.model.wrappers import unwrap
from prunekit.runtime.files import check_free, new_folder


def save_pretrained(
    model: Any, directory: str | Path, tokenizer: Any = None, remote_code: bool = False
) -> None:
    """Write a model and its tokenizer to a folder, from which it can be loaded bit for bit.

    The folder appears whole or not at all. transformers' own `from_pretrained` loads it where
    `prunekit.register_with_transformers` was called.

    Args:
        model: any model of transformers; its folder records its class.
        directory: a new or empty folder.
        tokenizer: the tokenizer of the model, or the processor that holds it, saved beside it.
        remote_code: put a file beside the model with which transformers loads it without prunekit,
            given `trust_remote_code=True`. Nothing where all layers are alike: transformers' own
            class loads that.

    Raises:
        CheckpointError: `directory` exists and is not empty, or can't be written; or the model is
            none that a folder can describe (adapters not merged, a scale its class would compute
            anew).
        TraceError: its weights are sharded, offloaded or quantised.
    """
    from transformers import PreTrainedModel

    if isinstance(model, nn.Module):
        model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        hint = ": merge its adapters first" if hasattr(model, "merge_and_unload") else ""
        raise CheckpointError(f"expected a model of transformers, got {type(model).__name__}{hint}")
    check_free(Path(directory))
    with _told(directory):
        record = required_record(model)
    original = record is None and not needs_prunekit(model.config.to_dict())
    with new_folder(Path(directory)) as folder, unvalidated(model.config):
        with written_whole(model):
            model.save_pretrained(folder, save_original_format=original)
        describe(folder, model, record, remote_code)
        with _told(directory):
            check_loadable(model, read_config(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_manifest(folder)


@contextmanager
def _told(directory: str | Path) -> Iterator[None]:
    """Name the folder, and what else can be done, in the refusal of a model by its class."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{directory}: {error}; prunekit.save keeps any module, for prunekit.load"
        ) from error
