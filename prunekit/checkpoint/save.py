"""Save a model folder: `config.json` with transformers' own `per_layer_config`, safetensors, the tokenizer."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunekit.checkpoint.load import only_ours
from prunekit.checkpoint.manifest import write_manifest
from prunekit.checkpoint.verify import check_loadable, record
from prunekit.errors import CheckpointError
from prunekit.exports.folder import describe


def save_pretrained(model: Any, directory: str | Path, tokenizer: Any = None, remote_code: bool = False) -> None:
    """Write `model` (and its tokenizer) to a folder that `prunekit.from_pretrained` loads bit for bit.

    The folder appears whole or not at all. transformers' own `from_pretrained` loads it where
    `prunekit.register_with_transformers` was called.

    Args:
        model: of transformers.
        directory: a new or empty folder.
        tokenizer: the model's.
        remote_code: put a file beside the model with which transformers loads it without prunekit, given
            `trust_remote_code=True`. Nothing where all layers are alike: transformers' own class loads that.

    Raises:
        CheckpointError: `directory` exists and is not empty, or can't be written; or the model is none that a folder
            can describe (adapters not merged, an encoder and a decoder, a scale its class would compute anew).
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        hint = ": merge its adapters first" if hasattr(model, "merge_and_unload") else ""
        raise CheckpointError(f"expected a model of transformers, got {type(model).__name__}{hint}")
    if model.config.is_encoder_decoder:
        raise CheckpointError(
            "a model of an encoder and a decoder can't be saved: config.json holds one list of layers"
        )
    check_free(Path(directory))
    sizes = record(model)
    with new_folder(Path(directory)) as folder, unvalidated(model.config):
        model.save_pretrained(folder, save_original_format=not only_ours(model.config.to_dict()) and sizes is None)
        describe(folder, model, sizes, remote_code)
        check_loadable(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_manifest(folder)


@contextmanager
def unvalidated(config: Any) -> Iterator[None]:
    """Let the config be written although its class refuses some of its layers' sizes (a head count that doesn't divide
    the hidden size, say).
    """

    def write(directory: str | Path, **_: Any) -> None:
        config.__dict__.pop("save_pretrained", None)
        config.to_json_file(Path(directory) / "config.json", use_diff=True)

    config.__dict__["save_pretrained"] = write
    try:
        yield
    finally:
        config.__dict__.pop("save_pretrained", None)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it at the end of the `with` block, or vanishes on an error."""
    check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target}: can't be written: {error.strerror}") from error
    with disk_errors(target):
        try:
            yield temporary
            publish(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_free(target: Path) -> None:
    """Raise CheckpointError where a folder to be written exists and holds anything."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: expected a new or empty folder, found one with files in it")


def publish(temporary: Path, target: Path) -> None:
    """Let a finished temporary folder become `target`, which is missing or empty."""
    temporary.chmod(0o755)
    for file in temporary.iterdir():
        file.chmod(0o644)
    if target.exists():
        target.rmdir()
    temporary.replace(target)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what a full disk or one that forbids writing raises into a CheckpointError that names `target`."""
    try:
        yield
    except BaseException as error:
        if _is_disk(error):
            raise CheckpointError(f"{target}: can't be written: {error}") from error
        raise


def _is_disk(error: BaseException) -> bool:
    """Whether an exception means that the disk is full or forbids writing; safetensors wraps the system's."""
    codes = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EIO}
    if isinstance(error, OSError):
        return error.errno in codes
    return type(error).__name__ == "SafetensorError" and "os error" in str(error).lower()


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: can't be written: {error.strerror}") from error
