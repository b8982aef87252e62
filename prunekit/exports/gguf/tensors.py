"""A model's weights under GGUF's names, in the layout and the type llama.cpp reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.errors import ExportError
from prunekit.exports.gguf.shapes import Shapes

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_BLOCK = 32  # numbers that share one scale in q8_0


@dataclass(frozen=True)
class Type:
    """GGUF's numbers for a type: of a tensor, and of a file that mostly holds it."""

    tensor_type: int
    file_type: int


TYPES = {"f32": Type(0, 0), "f16": Type(1, 1), "bf16": Type(30, 32), "q8_0": Type(8, 7)}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor to be written.

    Attributes:
        name: GGUF's.
        shape: rows first.
        dtype: a key of `TYPES`.
        make: computes it, float of any kind.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor]

    def announce(self, writer: Any) -> None:
        """Add the name, shape and type to the file's table."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = GGMLQuantizationType(TYPES[self.dtype].tensor_type)
        block, size = GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(self.shape) // block * size
        writer.add_tensor_info(
            self.name, self.shape, np.dtype(np.float32), num_bytes, raw_dtype=kind
        )

    def numbers(self) -> np.ndarray:
        """The tensor as it is stored.

        Raises:
            ExportError: numbers that are NaN, infinite, or too large for the type.
        """
        from gguf import GGMLQuantizationType, quants

        tensor = self.make().detach().cpu()
        assert tensor.shape == self.shape, (self.name, tensor.shape, self.shape)
        if self.dtype == "bf16":
            stored = tensor.to(torch.bfloat16).contiguous()
            array = stored.view(torch.int16).numpy()
        elif self.dtype == "q8_0":
            stored = tensor.float()
            array = quants.quantize(stored.numpy(), GGMLQuantizationType.Q8_0)
        else:
            stored = tensor.to(torch.float16 if self.dtype == "f16" else torch.float32).contiguous()
            array = stored.numpy()
        if not stored.isfinite().all():
            raise ExportError(
                f"{self.name}: NaN or numbers beyond {self.dtype}'s range; bf16 has float32's"
            )
        return array


def tensors_of(model: Any, shapes: Shapes, architecture: str, dtype: str) -> list[Stored]:
    """Every tensor of the file, not computed yet.

    Args:
        model: a model that `read_shapes` accepts.
        shapes: its sizes.
        architecture: llama.cpp's.
        dtype: of the matrices; vectors are f32.

    Raises:
        ExportError: the model holds a parameter that has no place in the file.
    """
    found: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
    taken: set[int] = set()

    def put(
        name: str, parameter: Tensor, change: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> None:
        taken.add(id(parameter))
        found[name] = (tuple(parameter.shape), lambda: change(parameter))

    put("token_embd.weight", model.get_input_embeddings().weight)
    put("output_norm.weight", model.model.norm.weight)
    if not shapes.tied:
        put("output.weight", model.get_output_embeddings().weight)
    if shapes.rope_factors is not None:
        put("rope_freqs.weight", shapes.rope_factors)
    for index, layer in enumerate(model.model.layers):
        for path, name, parameter in _of_layer(layer):
            put(f"blk.{index}.{name}", parameter, _change(path, index, shapes, architecture))
        if architecture == "openelm":
            _fuse(found, index)
    for name, parameter in model.named_parameters():
        if id(parameter) not in taken:
            raise ExportError(f"{name}: llama.cpp's {architecture} has no place for it")
    return [
        Stored(name=name, shape=shape, dtype=_type(shape, dtype), make=make)
        for name, (shape, make) in found.items()
    ]


def _of_layer(layer: Any) -> Iterator[tuple[str, str, Tensor]]:
    """(path in the layer, GGUF's name, parameter)."""
    for name, parameter in layer.named_parameters():
        path, _, kind = name.rpartition(".")
        if path in _NAMES:
            yield path, f"{_NAMES[path]}.{kind}", parameter


def _type(shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) < 2:
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % _BLOCK else dtype


def _change(path: str, layer: int, shapes: Shapes, architecture: str) -> Callable[[Tensor], Tensor]:
    """What a parameter goes through: rotary order in queries and keys, the scores' scale in
    queries.
    """
    scale = shapes.score_scale[layer]
    scaled = path == ("self_attn.q_norm" if shapes.normalised else "self_attn.q_proj")
    permuted = architecture in ("llama", "deci") and path in (
        "self_attn.q_proj",
        "self_attn.k_proj",
    )

    def change(parameter: Tensor) -> Tensor:
        tensor = parameter.detach()
        if scaled and not math.isclose(scale, 1, rel_tol=1e-6):
            tensor = tensor.float() * scale
        return rotary_order(tensor, shapes.head_dim) if permuted else tensor

    return change


def rotary_order(rows: Tensor, head_dim: int) -> Tensor:
    """Put the two halves of every head's rows in turn, as llama.cpp's `llama` rotates neighbours.

    Args:
        rows: a query's or key's weight [heads · head_dim, hidden] or bias [heads · head_dim].
        head_dim: of one head.

    Returns:
        The same
        rows: 0, head_dim/2, 1, head_dim/2 + 1, …
    """
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _fuse(found: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]], layer: int) -> None:
    """Put a layer's queries, keys and values in one matrix."""
    parts = [found.pop(f"blk.{layer}.{_NAMES[path]}.weight") for path in _FUSED]
    rows = sum(shape[0] for shape, _ in parts)
    found[f"blk.{layer}.attn_qkv.weight"] = (
        (rows, parts[0][0][1]),
        lambda: torch.cat([make() for _, make in parts]),
    )
