"""What models call their sizes: the one file of the core that knows names of architectures' own.

A *quantity* is a size by its usual name ("intermediate_size"); the attributes of modules and
configs that hold it go by that name or a synonym. A synonym counts only where the value agrees, so
one word may stand for two quantities ("hidden_dim").
"""

from __future__ import annotations

from typing import Any

from prunekit.model.compat import has, read

SYNONYMS = {
    "num_attention_heads": (
        "num_attention_heads",
        "num_heads",
        "n_heads",
        "n_head",
        "num_query_heads",
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv"),
    "num_key_value_groups": ("num_key_value_groups", "n_rep"),
    "attention_width": ("split_size", "all_head_size"),
    "intermediate_size": (
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "ffn_dim",
        "ffn_hidden_size",
        "inner_dim",
        "n_inner",
        "d_ff",
        "intermediate_dim",
        "hidden_dim",
    ),
    "hidden_size": ("hidden_size", "n_embd", "embed_dim", "d_model", "hidden_dim"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "head_dim": (
        "head_dim",
        "head_size",
        "attn_head_size",
        "key_value_proj_dim",
        "d_kv",
        "kv_channels",
    ),
    "rotary_dim": ("rotary_ndims", "rotary_dim"),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
}
# Names that mean the width of all heads together, inside an attention module.
ATTENTION_WIDTHS = (
    "embed_dim",
    "hidden_size",
    "inner_dim",
    "d_model",
    "n_embd",
    "intermediate_size",
    "value_dim",
)
# What modules of linear attention and state-space models call quantities; their configs don't.
RECURRENT_NAMES = {
    "num_attention_heads": ("num_v_heads",),
    "num_key_value_heads": ("num_k_heads", "n_groups"),
    "groups": ("conv_dim",),
}
# What a norm over all heads calls their width; beside it, a norm of the residual stream may use
# the same word.
NORM_WIDTHS = ("group_size",)
# Attributes that are not set by their value alone: real models have as many heads as numbers in a
# state, or as positions in a chunk.
NO_GUESSES = (
    *("state_size", "ssm_state_size", "chunk_size", "conv_kernel_size", "conv_kernel"),
    "layer_idx",
)
# Config values that count the layers of one sort at the beginning of the stack.
FIRST_LAYERS = ("first_k_dense_replace", "max_window_layers")
# Config lists that never hold one entry per layer.
NO_LAYERS = ("architectures", "eos_token_id", "suppress_tokens", "begin_suppress_tokens")
# Config values that say to how many experts a token is sent.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


def synonyms(quantity: str) -> tuple[str, ...]:
    """The names of a quantity, the usual one first; an unknown quantity has its own name only."""
    return SYNONYMS.get(quantity, (quantity,))


def quantity_of(name: str) -> str:
    """The quantity an attribute's name stands for, the first of several; else the name itself."""
    return next((quantity for quantity, names in SYNONYMS.items() if name in names), name)


def config_name(config: Any, quantity: str) -> str | None:
    """A config's name for a quantity: the first synonym with a value, else the first that exists.

    None where the config has no attribute of these names.
    """
    names = [name for name in SYNONYMS[quantity] if has(config, name)]
    valued = [name for name in names if read(config, name) is not None]
    return next(iter(valued or names), None)


def layer_counts(config: Any) -> list[int]:
    """The numbers of layers that a config states, under whatever synonyms it has."""
    values = [getattr(config, name, None) for name in SYNONYMS["num_hidden_layers"]]
    return [value for value in values if isinstance(value, int)]


def num_layers(config: Any) -> int | None:
    """The number of layers that a config states, under the usual name or a synonym; or None."""
    return next(iter(layer_counts(config)), None)


def experts_per_token(config: Any) -> int | None:
    """To how many experts a token is sent: the largest number stated; None without experts."""
    values = [getattr(config, name, None) for name in _EXPERTS_PER_TOKEN]
    return max((value for value in values if isinstance(value, int)), default=None)


def head_dim_of(config: Any) -> int | None:
    """The width of an attention head: as the config states it, else hidden size over head count.

    None where the config has neither, or the head count does not divide the hidden size.
    """
    if isinstance(stated := read(config, "head_dim"), int):
        return stated
    heads, hidden = (_size(config, name) for name in ("num_attention_heads", "hidden_size"))
    if not isinstance(heads, int) or not isinstance(hidden, int) or not heads:
        return None
    return hidden // heads if hidden % heads == 0 else None


def hidden_size_of(config: Any) -> int | None:
    """The width of the residual stream, as the config states it; or None."""
    size = _size(config, "hidden_size")
    return size if isinstance(size, int) else None


def _size(config: Any, quantity: str) -> Any:
    """The value of a quantity, under the name that the config has for it; or None."""
    name = config_name(config, quantity)
    return None if name is None else read(config, name)
