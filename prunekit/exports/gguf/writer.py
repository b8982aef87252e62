"""Write a model as a GGUF file for llama.cpp: metadata, tokenizer and one tensor after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import CheckpointError, ExportError, suggest
from prunekit.exports.gguf.shapes import Shapes, architecture_of, check_family, read_shapes
from prunekit.exports.gguf.tensors import TYPES, Stored, tensors_of
from prunekit.exports.gguf.tokenizer import add_tokenizer
from prunekit.runtime.console import say
from prunekit.runtime.files import disk_errors


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """A GGUF file, as llama.cpp loads it.

    Models whose layers are alike become `llama`, `qwen2` or `qwen3`; the others `deci`, or
    `openelm` where queries and keys are normalised. Vectors stay float32; rows that q8_0's blocks
    of 32 don't divide stay f16.

    Attributes:
        dtype: f32, f16, bf16 or q8_0.

    Raises:
        ExportError: a dtype that is none of these.
    """

    dtype: str = "f16"

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise ExportError(
                f"export.dtype: {self.dtype!r} is unknown; {suggest(str(self.dtype), list(TYPES))}"
            )

    def check_model(self, model: Any) -> None:
        """Raise ExportError where `write` would refuse the model whatever its sizes."""
        _package()
        check_family(model)

    def write(self, model: Any, tokenizer: Any, target: Path) -> Path:
        """Write `target/model-<dtype>.gguf`: all of it or nothing.

        Args:
            model: a causal language model of transformers, dense or pruned.
            tokenizer: its fast tokenizer.
            target: a folder; it is made where it is missing.

        Returns:
            The file's path.

        Raises:
            ExportError: the `gguf` package is missing, llama.cpp can't express the model or its
                tokenizer, a weight doesn't fit into the dtype, or the file is there already.
            CheckpointError: the disk is full or forbids writing.
        """
        gguf = _package()
        file = Path(target) / f"model-{self.dtype}.gguf"
        if file.exists():
            raise ExportError(f"{file}: exists already")
        shapes = read_shapes(model)
        architecture = architecture_of(shapes)
        with _whole(file) as temporary:
            writer = gguf.GGUFWriter(temporary, architecture)
            try:
                _add_metadata(writer, model, shapes, architecture)
                writer.add_file_type(TYPES[self.dtype].file_type)
                add_tokenizer(writer, tokenizer, model, shapes.vocabulary)
                _write(writer, tensors_of(model, shapes, architecture, self.dtype))
            finally:
                writer.close()
        say(f"{file}: {architecture}, {self.dtype}, {file.stat().st_size / 1e6:.1f} MB")
        return file


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError(
            "export=gguf needs the package gguf: pip install prunekit[gguf]"
        ) from None
    return gguf


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A temporary file beside `file` that becomes it, or vanishes on an error with the folders made
    for it.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    missing = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{file}: can't be written: {error.strerror}") from error
    with disk_errors(file):
        try:
            yield temporary
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            for folder in missing:
                with suppress(OSError):  # someone else uses it now
                    folder.rmdir()
            raise


def _add_metadata(writer: Any, model: Any, shapes: Shapes, architecture: str) -> None:
    """What llama.cpp calls hyperparameters; `deci` and `openelm` read a number for every layer."""
    config = model.config
    writer.add_name(Path(getattr(config, "_name_or_path", "") or type(model).__name__).name)
    writer.add_quantization_version(2)
    writer.add_block_count(len(shapes.layers))
    writer.add_context_length(shapes.context)
    writer.add_embedding_length(shapes.hidden)
    writer.add_vocab_size(shapes.vocabulary)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    columns = [
        list(column)
        for column in zip(*((x.heads, x.kv_heads, x.width) for x in shapes.layers), strict=True)
    ]
    alike = architecture not in ("deci", "openelm")
    heads, kv_heads, widths = (column[0] if alike else column for column in columns)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(widths)
    writer.add_key_length(shapes.head_dim)
    writer.add_value_length(shapes.head_dim)
    writer.add_rope_dimension_count(shapes.head_dim)
    writer.add_rope_freq_base(shapes.rope_base)
    if shapes.rope_stretch != 1:
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shapes.rope_stretch)


def _write(writer: Any, tensors: list[Stored]) -> None:
    """Names and sizes first, then the tensors' numbers, each made when its turn comes."""
    for tensor in tensors:
        tensor.announce(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.numbers())
