"""A GGUF file for llama.cpp: metadata, the tokenizer, and one tensor after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from prunekit.errors import ExportError, suggest
from prunekit.exports.base import Export, Written, require_package
from prunekit.exports.gguf.shapes import Shapes, architecture_of, check_family, read_shapes
from prunekit.exports.gguf.tensors import TYPES, GgufTensor, list_tensors
from prunekit.exports.gguf.tokenizer import add_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Gguf(Export):
    """A GGUF file, as llama.cpp loads it; `write` leaves `model-<dtype>.gguf`.

    Models whose layers are alike become `llama`, `qwen2` or `qwen3`; the others `deci`, or
    `openelm` where queries and keys are normalised. Vectors stay float32; rows that q8_0's blocks
    of 32 don't divide stay f16. Needs the package gguf.

    Attributes:
        dtype: f32, f16, bf16 or q8_0.

    Raises:
        ExportError: a dtype that is none of these.
    """

    name: ClassVar[str] = "gguf"
    dtype: str = "f16"

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise ExportError(
                f"export.dtype: {self.dtype!r} is unknown; {suggest(str(self.dtype), list(TYPES))}"
            )

    @property
    def target(self) -> str:
        """The name of the file."""
        return f"model-{self.dtype}.gguf"

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise ExportError where the package gguf is missing or no model of this family fits."""
        require_package("gguf", self.name)
        check_family(model)

    def create(
        self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Written:
        """Write the file.

        Raises:
            ExportError: llama.cpp can't express the model or its tokenizer, or a weight does not
                fit into the dtype.
        """
        from gguf import GGUFWriter, LlamaFileType

        shapes = read_shapes(model)
        architecture = architecture_of(shapes)
        held = "ALL_F32" if self.dtype == "f32" else f"MOSTLY_{self.dtype.upper()}"
        writer = GGUFWriter(path, architecture)
        try:
            _add_metadata(writer, model, shapes, architecture)
            writer.add_file_type(LlamaFileType[held])
            add_tokenizer(writer, tokenizer, model, shapes.vocabulary)
            _write_tensors(writer, list_tensors(model, shapes, architecture, self.dtype))
        finally:
            writer.close()
        return Written(file=path, about=f"{architecture}, {self.dtype}")


def _add_metadata(
    writer: GGUFWriter, model: PreTrainedModel, shapes: Shapes, architecture: str
) -> None:
    """What llama.cpp calls hyperparameters; `deci` and `openelm` read a number for every layer."""
    from gguf import GGML_QUANT_VERSION, RopeScalingType

    config = model.config
    writer.add_name(Path(getattr(config, "_name_or_path", "") or type(model).__name__).name)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(len(shapes.layers))
    writer.add_context_length(shapes.context)
    writer.add_embedding_length(shapes.hidden)
    writer.add_vocab_size(shapes.vocabulary)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    by_layer = architecture in ("deci", "openelm")
    layers = shapes.layers if by_layer else shapes.layers[:1]
    heads = [layer.heads for layer in layers]
    kv_heads = [layer.kv_heads for layer in layers]
    widths = [layer.width for layer in layers]
    writer.add_head_count(heads if by_layer else heads[0])
    writer.add_head_count_kv(kv_heads if by_layer else kv_heads[0])
    writer.add_feed_forward_length(widths if by_layer else widths[0])
    writer.add_key_length(shapes.head_dim)
    writer.add_value_length(shapes.head_dim)
    writer.add_rope_dimension_count(shapes.head_dim)
    writer.add_rope_freq_base(shapes.rope_base)
    if shapes.rope_stretch != 1:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(shapes.rope_stretch)


def _write_tensors(writer: GGUFWriter, tensors: Sequence[GgufTensor]) -> None:
    """Names and sizes first, then the tensors' numbers, each computed when its turn comes."""
    for tensor in tensors:
        tensor.announce(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.numbers())
