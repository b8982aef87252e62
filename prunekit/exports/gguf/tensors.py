"""A model's weights under GGUF's names, in the layout and the type that llama.cpp reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from prunekit.errors import ExportError
from prunekit.exports.gguf.shapes import Layer, Shapes

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedModel

TYPES = ("f32", "f16", "bf16", "q8_0")
# A tensor that is computed when it is written: its shape, rows first, and the function.
Pending: TypeAlias = tuple[tuple[int, ...], Callable[[], Tensor]]

_FUSED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor to be written.

    Attributes:
        name: GGUF's name.
        shape: its sizes, rows first.
        dtype: one of `TYPES`.
        make: computes it, in any floating-point type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor]

    @property
    def kind(self) -> GGMLQuantizationType:
        """GGUF's enum value of the type."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType[self.dtype.upper()]

    def announce(self, writer: GGUFWriter) -> None:
        """Add the name, the shape and the type to the file's table."""
        from gguf.quants import quant_shape_to_byte_shape

        num_bytes = math.prod(quant_shape_to_byte_shape(self.shape, self.kind))
        writer.add_tensor_info(
            self.name, self.shape, np.dtype(np.float32), num_bytes, raw_dtype=self.kind
        )

    def numbers(self) -> np.ndarray:
        """The tensor as it is stored.

        Raises:
            ExportError: numbers that are NaN, infinite, or too large for the type.
        """
        from gguf import quants

        tensor = self.make().detach().cpu()
        assert tensor.shape == self.shape, (self.name, tensor.shape, self.shape)
        # torch casts without the float32 copy that quantize would make of half-precision weights.
        if self.dtype == "bf16":
            stored = tensor.to(torch.bfloat16).contiguous()
            array = stored.view(torch.int16).numpy()
        elif self.dtype == "q8_0":
            stored = tensor.float()
            array = quants.quantize(stored.numpy(), self.kind)
        else:
            stored = tensor.to(torch.float16 if self.dtype == "f16" else torch.float32).contiguous()
            array = stored.numpy()
        if not stored.isfinite().all():
            raise ExportError(
                f"{self.name}: NaN or numbers beyond {self.dtype}'s range; bf16 has float32's"
            )
        return array


def list_tensors(
    model: PreTrainedModel, shapes: Shapes, architecture: str, dtype: str
) -> list[GgufTensor]:
    """Every tensor of the file, not computed yet.

    Args:
        model: a model that `read_shapes` accepts.
        shapes: its sizes.
        architecture: llama.cpp's name of an architecture.
        dtype: the type of the matrices; vectors are f32.

    Raises:
        ExportError: the model holds a parameter that has no place in the file.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == architecture)
    names = get_tensor_name_map(arch, len(shapes.layers))
    stored = []
    for name, (shape, make) in _named_tensors(model, shapes, architecture):
        known = names.get_name(name, (".weight", ".bias"))
        if known is None:
            raise ExportError(f"{name}: llama.cpp's {architecture} has no place for it")
        stored.append(GgufTensor(name=known, shape=shape, dtype=_type(shape, dtype), make=make))
    return stored


def _named_tensors(
    model: PreTrainedModel, shapes: Shapes, architecture: str
) -> Iterator[tuple[str, Pending]]:
    """Each tensor by the name of its parameter: those outside of layers first; tied ones once."""
    parameters = dict(model.named_parameters())
    inside = {name for name in parameters if name.startswith("model.layers.")}
    for name, parameter in parameters.items():
        if name not in inside:
            yield name, _postpone(parameter)
    if shapes.rope_factors is not None:
        yield "rope_freqs.weight", _postpone(shapes.rope_factors)
    for index in range(len(shapes.layers)):
        prefix = f"model.layers.{index}."
        layer = {}
        for name, parameter in parameters.items():
            path = name.removeprefix(prefix)
            if name.startswith(prefix) and not _is_gone(path, shapes.layers[index]):
                change = _change(path, index, shapes, architecture)
                layer[name] = _fill(parameter, path, index, shapes) or _postpone(parameter, change)
        if architecture == "openelm":
            _fuse(layer, f"{prefix}self_attn.")
        yield from layer.items()


def _is_gone(path: str, layer: Layer) -> bool:
    """Whether a parameter is of an attention or an FFN that the layer hasn't in the file."""
    if path.startswith(("self_attn.", "input_layernorm.")):
        return not layer.heads
    return not layer.width


def _fill(parameter: Tensor, path: str, index: int, shapes: Shapes) -> Pending | None:
    """The zeros that stand in the file for a parameter of no units; None for other parameters.

    Args:
        parameter: the parameter.
        path: its name in its layer.
        index: the layer's index.
        shapes: the sizes of the model.
    """
    if parameter.numel():
        return None
    layer = shapes.layers[index]
    heads = layer.kv_heads if "k_proj" in path or "v_proj" in path else layer.heads
    width = heads * shapes.head_dim if path.startswith("self_attn.") else layer.width
    shape = tuple(size or width for size in parameter.shape)
    return shape, lambda: torch.zeros(shape)


def _postpone(
    parameter: Tensor, change: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Pending:
    return tuple(parameter.shape), lambda: change(parameter)


def _type(shape: tuple[int, ...], dtype: str) -> str:
    """The type of one tensor: vectors stay f32, rows that q8_0's blocks don't divide f16."""
    if len(shape) < 2:
        return "f32"
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[dtype.upper()]]  # numbers that share a scale
    return "f16" if shape[-1] % block else dtype


def _change(path: str, layer: int, shapes: Shapes, architecture: str) -> Callable[[Tensor], Tensor]:
    """The function that a parameter goes through before it is stored.

    Queries and keys get llama.cpp's rotary order; queries the scale of the scores as well.


    Args:
        path: the parameter's name in its layer.
        layer: the layer's index.
        shapes: the sizes of the model.
        architecture: llama.cpp's name of an architecture.
    """
    module = path.rpartition(".")[0]
    scale = shapes.score_scale[layer]
    scaled = module == ("self_attn.q_norm" if shapes.normalised else "self_attn.q_proj")
    rotated = module in ("self_attn.q_proj", "self_attn.k_proj")
    permuted = architecture in ("llama", "deci") and rotated

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
        head_dim: the size of one head.

    Returns:
        The same rows in the order 0, head_dim/2, 1, head_dim/2 + 1, … of every head.
    """
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _fuse(layer: dict[str, Pending], attention: str) -> None:
    """Put a layer's queries, keys and values in one matrix, under the name that gguf's map knows.

    Args:
        layer: parameter name → tensor, changed in place.
        attention: the beginning of the names of the attention's parameters.
    """
    parts = [layer.pop(f"{attention}{name}.weight") for name in _FUSED]
    rows = sum(shape[0] for shape, _ in parts)
    layer[f"{attention}query_key_value.weight"] = (
        (rows, parts[0][0][1]),
        lambda: torch.cat([make() for _, make in parts]),
    )
