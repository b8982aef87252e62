"""A model's sizes as llama.cpp must know them, and which of its architectures can hold them.

| architecture | layers differ | queries and keys normalised | biases | rotary frequencies |
|---|---|---|---|---|
| `llama` | no | no | any | any, as `rope_freqs` |
| `qwen2` | no | no | on q, k and v | plain |
| `qwen3` | no | yes | none | plain or stretched |
| `deci` | yes | no | any | any, as `rope_freqs` |
| `openelm` | yes | yes | none | plain or stretched; the output is the embedding |

A layer may have no attention, no FFN or neither in `deci` alone. There too a sublayer whose bias is
left needs a head or channels of zeros in its place, and so do some that llama.cpp can't do without.

llama.cpp before its pull request 21245 (April 2026) reads query biases only where heads fill the
hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.errors import ExportError
from prunekit.runtime.console import say

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ZEROS = 32  # the width of an FFN of zeros: a block of q8_0
_UNIFORM = "prune with shapes=uniform, which gives every layer the same widths"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's sizes: query heads, key-value heads, the feed-forward width.

    Without attention or FFN in the model, they are what the file needs in its place.
    """

    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A model's sizes.

    Attributes:
        layers: the sizes of each layer.
        hidden: the width of the residual stream.
        head_dim: the size of one head.
        vocabulary: the number of rows of the embedding.
        context: the longest text in tokens.
        tied: whether the output is the embedding.
        normalised: whether queries and keys are normalised.
        biases: the linears that have a bias in some layer, by the last part of their names.
        rope_base: the base of the rotary frequencies `base^(-2i / head_dim)`.
        rope_stretch: what positions are divided by.
        rope_factors: what the frequencies are divided by besides, [head_dim / 2]; None where all
            are 1.
        score_scale: what each layer's scores are multiplied by beyond `1 / sqrt(head_dim)`.
    """

    layers: tuple[Layer, ...]
    hidden: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool
    normalised: bool
    biases: frozenset[str]
    rope_base: float
    rope_stretch: float
    rope_factors: Tensor | None
    score_scale: tuple[float, ...]

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike."""
        return len(set(self.layers)) == 1


def read_shapes(model: PreTrainedModel) -> Shapes:
    """The sizes of a model, from its weights.

    Args:
        model: a causal language model of transformers, dense or pruned.

    Raises:
        ExportError: a family that isn't known here, or one whose maths llama.cpp computes
            otherwise.
    """
    config = model.config
    check_family(model)
    decoder: Any = model.model
    embedding: Any = model.get_input_embeddings()
    output: Any = model.get_output_embeddings()
    rotary = decoder.rotary_emb
    head_dim = 2 * len(rotary.inv_freq)
    base, stretch, factors = _rope(config, rotary.inv_freq)
    linears = [(name, linear) for layer in decoder.layers for name, linear in _linears(layer)]
    normalised = hasattr(decoder.layers[0].self_attn, "q_norm")
    ends = (decoder.layers[0], decoder.layers[-1])
    return Shapes(
        layers=tuple(
            _layer(layer, head_dim, *(normalised or layer is end for end in ends))
            for layer in decoder.layers
        ),
        hidden=embedding.weight.shape[1],
        head_dim=head_dim,
        vocabulary=embedding.weight.shape[0],
        context=_context(config),
        tied=output.weight is embedding.weight,
        normalised=normalised,
        biases=frozenset(name for name, linear in linears if linear.bias is not None),
        rope_base=base,
        rope_stretch=stretch,
        rope_factors=factors,
        score_scale=tuple(
            layer.self_attn.scaling * math.sqrt(head_dim) * rotary.attention_scaling**2
            for layer in decoder.layers
        ),
    )


def check_family(model: PreTrainedModel) -> None:
    """Raise ExportError for a family that is unknown here, or that llama.cpp computes otherwise."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        hint = ": merge its adapters first" if hasattr(model, "merge_and_unload") else ""
        raise ExportError(
            f"expected a causal language model of transformers, got {type(model).__name__}{hint}"
        )
    config: Any = model.config
    if config.model_type not in FAMILIES:
        raise ExportError(
            f"export=gguf writes {', '.join(FAMILIES)} models, got {config.model_type}: where its "
            "layers are alike (shapes=uniform), llama.cpp's own script may convert the saved folder"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(
            f"config.hidden_act: llama.cpp computes silu for this family, got {config.hidden_act}"
        )


def _linears(layer: Any) -> list[tuple[str, nn.Linear]]:
    """The linears of a layer, by the last part of their names."""
    attention = [(name, layer.self_attn.get_submodule(name)) for name in ATTENTION]
    return attention + [(name, layer.mlp.get_submodule(name)) for name in MLP]


def _layer(layer: Any, head_dim: int, needs_head: bool, needs_width: bool) -> Layer:
    """The sizes of one decoder layer, from its weights.

    Args:
        layer: the decoder layer.
        head_dim: the size of one head.
        needs_head: llama.cpp can't do without attention here. By the first layer it tells whether
            there are heads at all.
        needs_width: it can't do without an FFN here. The last one picks the tokens that count.
    """
    attention, mlp = layer.self_attn, layer.mlp
    heads = len(attention.q_proj.weight) // head_dim
    kv_heads = len(attention.k_proj.weight) // head_dim if heads else 0
    width = len(mlp.up_proj.weight)
    if not heads and (needs_head or attention.o_proj.bias is not None):
        heads = kv_heads = 1
    # Without an FFN llama.cpp forgets what the attention of the layer has added.
    if not width and (needs_width or heads or mlp.down_proj.bias is not None):
        width = ZEROS
    return Layer(heads=heads, kv_heads=kv_heads, width=width)


def _rope(config: PretrainedConfig, inv_freq: Tensor) -> tuple[float, float, Tensor | None]:
    """(base, stretch, factors) of n rotary frequencies `base^(-i / n) / (stretch · factors[i])`."""
    parameters = config.rope_parameters
    kind, base = parameters.get("rope_type", "default"), float(parameters["rope_theta"])
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ExportError(
            f"rope_type {kind}: the rotary frequencies depend on the text's length, "
            "GGUF's are fixed"
        )
    plain = base ** (-torch.arange(len(inv_freq), dtype=torch.float64) / len(inv_freq))
    factors = plain / inv_freq.double().cpu()
    # A model that was turned into half precision has rounded tables too.
    rounding = max(1e-5, torch.finfo(inv_freq.dtype).eps)
    if torch.allclose(factors, factors[:1], rtol=rounding, atol=0):
        stretch = float(factors[0])
        return base, 1.0 if math.isclose(stretch, 1, rel_tol=rounding) else stretch, None
    return base, 1.0, factors.float()


def _context(config: PretrainedConfig) -> int:
    """The longest text, or the window that layers look at: GGUF's `llama` knows no windows."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if (
        window
        and (kinds is None or "sliding_attention" in kinds)
        and window < config.max_position_embeddings
    ):
        say(f"attention windows of {window} tokens can't be written: the file's context ends there")
        return window
    return config.max_position_embeddings


def architecture_of(shapes: Shapes) -> str:
    """llama.cpp's architecture for a model's sizes.

    Raises:
        ExportError: none can hold them; the message says why and what would.
    """
    if shapes.normalised:
        return _choose_for_normalised(shapes)
    square = all(layer.heads * shapes.head_dim == shapes.hidden for layer in shapes.layers)
    if "q_proj" in shapes.biases and not square:
        say(
            "query biases of heads that don't fill the hidden size: "
            "llama.cpp reads them since April 2026"
        )
    if not shapes.uniform or not all(layer.heads and layer.width for layer in shapes.layers):
        return "deci"
    stock = (
        square
        and shapes.rope_factors is None
        and all(math.isclose(scale, 1) for scale in shapes.score_scale)
    )
    return "qwen2" if stock and shapes.biases == {"q_proj", "k_proj", "v_proj"} else "llama"


def _choose_for_normalised(shapes: Shapes) -> str:
    """Choose the architecture for normalised queries and keys: `qwen3`, or `openelm`.

    The latter is for models whose layers differ.
    """
    name = "qwen3" if shapes.uniform else "openelm"
    if shapes.biases:
        raise ExportError(
            f"llama.cpp's {name} loads no biases, found some on "
            f"{', '.join(sorted(shapes.biases))}: those that pruning added go without "
            "compensation=bias"
        )
    if shapes.rope_factors is not None:
        raise ExportError(
            f"llama.cpp's {name} takes plain or stretched rotary frequencies, these are neither: "
            "remove the scaling from rope_parameters, or widths of heads from what is pruned"
        )
    if not shapes.uniform and not shapes.tied:
        raise ExportError(
            "layers that differ need llama.cpp's openelm where queries and keys are normalised, "
            f"and its output is the embedding, which this model has apart: {_UNIFORM}"
        )
    return name
