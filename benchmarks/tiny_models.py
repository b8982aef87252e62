"""A tiny random model of any causal type of transformers, by rules over fields of its config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, SPECIAL = 128, 24  # special tokens come first, no text holds them
LAYERS = 4

# The first pattern that matches the whole name of a field gives its value.
RULES: tuple[tuple[str, Any], ...] = (
    (r".*vocab_size(_per_layer_input|_base)?|num_embeddings", VOCABULARY),
    (r"type_vocab_size|n_langs", None),
    (r"chunk_size_feed_forward|pretraining_tp|num_channels|in_channels", None),
    # Widths.
    (r"hidden_size_per_layer_input|ple_embed_dim", 8),
    (r"(shared_)?(expert|moe|shared)s?_?.*(intermediate_size|ffn_hidden_size)", 32),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_inner|d_ff|dff|dim_ff|feed_forward_size|"
        r"intermediate_size_mlp)",
        96,
    ),
    (
        r"hidden_size|hidden_size_global|d_model|n_embd|emb_dim|embedding_dim|embedding_size|"
        r"word_embed_proj_dim|(input|output)_embedding_size|lru_width|.*_embed_dim|embed_dim|"
        r"backbone_hidden_size|.*output_dim|out_hidden_size|attention_hidden_size",
        64,
    ),
    # Heads.
    (
        r"(num_)?(key_value|kv)_heads|num_kv_heads|kv_n_heads|.*_num_key_value_heads|"
        r"num_global_key_value_heads",
        4,
    ),
    (r"qk_head_dim", 16),
    (
        r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|.*head_dim|dim_head|d_head|kv_channels|"
        r"attention_head_size|d_kv",
        8,
    ),
    (
        r"(num_|n_)?(attention_heads|heads?)|(en|de)coder_attention_heads|"
        r"num_(en|de)coder_attention_heads|swa_num_attention_heads|conf_num_attention_heads",
        8,
    ),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 24),
    (r"index_n_heads", 2),
    (r"index_topk", 16),
    (r"rotary_dim", 4),
    # Layers.
    (r"num_(hidden_|en|de)?(coder_)?layers|n_layers?|(en|de)coder_layers|depth|num_blocks", LAYERS),
    # Experts.
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k", 2),
    (
        r"n_group|num_expert_group|topk_group|n_shared_experts|num_shared_experts|"
        r"moe_num_shared_experts",
        1,
    ),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    # Positions and windows.
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|"
        r"max_(source|target)_positions",
        128,
    ),
    (r"sliding_window(_size)?|attention_window_size|local_attention|local_attention_window_len", 8),
    (r"(mamba_)?chunk_size", 16),
    (r"block_size", 8),
    # State-space models and linear attention.
    (r"mamba_n_heads|mamba_num_heads|linear_num_value_heads|n_mamba_heads", 8),
    (r"linear_num_key_heads", 4),
    (r"(mamba_d_)?state(_size)?|ssm_state_size|mamba_d_state", 12),
    (r"n_groups", 2),
    (r"time_step_rank|mamba_dt_rank", 4),
)


def build(model_type: str) -> nn.Module:
    """A tiny model of a type with random numbers in every parameter, in evaluation mode."""
    torch.manual_seed(0)
    model = class_of(model_type)._from_config(make_config(model_type))
    return randomise(model).eval()


def example(model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """What a model's forward call takes for token ids."""
    books = getattr(model, "num_codebooks", 1)  # rows of tokens for each sample
    return {"input_ids": ids if books == 1 else ids[:, None].repeat(1, books, 1)}


def prompt(model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """What a model generates from, for token ids: all rows of tokens one below the other."""
    return {"input_ids": example(model, ids)["input_ids"].flatten(0, -2)}


def calibration(model: nn.Module, ids: torch.Tensor) -> torch.Tensor | list[dict[str, Any]]:
    """Token ids as `prunekit.prune` takes them for the model."""
    if "num_codebooks" in vars(model):
        inputs = example(model, ids)
        return [inputs | {"labels": inputs["input_ids"].transpose(1, 2)}]
    return ids


def randomise(model: nn.Module) -> nn.Module:
    """Add noise to every parameter, so that no zero or one hides a fault."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def class_of(model_type: str) -> Any:
    """The class of transformers that makes a type's causal language models."""
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def make_config(model_type: str) -> PretrainedConfig:
    """The config of a tiny model of a type, or of its text part where the class takes that."""
    hand = dict(BY_HAND.get(model_type, {}))
    start = hand.pop("", {})
    default = AutoConfig.for_model(model_type, **start)
    decoder = {} if default.is_encoder_decoder else {"is_decoder": True}  # a BERT, for instance
    decoder = decoder if "is_decoder" in vars(default) else {}
    values = _merge(_merge(start, shrink(default)), decoder | hand)
    config = AutoConfig.for_model(model_type, **values)
    wanted = class_of(model_type).config_class
    parts = [part for part in vars(config).values() if type(part) is wanted]
    return parts[0] if parts and type(config) is not wanted else config


def _merge(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config with others over them, part by part; what is None is left out."""
    merged = dict(values)
    for name, value in more.items():
        both = isinstance(value, Mapping) and isinstance(values.get(name), Mapping)
        merged[name] = _merge(values[name], value) if both else value
    return merged


def shrink(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of a config that are to be smaller than by default, with those of its parts."""
    values: dict[str, Any] = {}
    token = iter(range(3, SPECIAL))
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            values[name] = shrink(value) | {"model_type": value.model_type}
        elif (small := _shrink_field(name, value, token)) is not None:
            values[name] = small
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    return values | _pick_layers(config)


def _shrink_field(name: str, value: Any, token: Iterator[int]) -> int | None:
    if re.fullmatch(r".*token_(id|index)", name):
        fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return None if value is None else fixed.get(name) or (0 if name in fixed else next(token))
    if type(value) is not int or value <= 0:
        return None
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return small
    return None


def _pick_layers(config: PretrainedConfig) -> dict[str, Any]:
    """Lists with an entry for each layer, of a few layers that show all kinds of layers."""
    counts = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    layers = next((getattr(config, n) for n in counts if hasattr(config, n)), None)
    lists = {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and layers and len(value) == layers
    }
    if not lists:
        return {}
    kinds: dict[Any, int] = {}
    for index in range(layers):
        kinds.setdefault(repr([values[index] for values in lists.values()]), index)
    chosen = sorted(kinds.values())
    chosen = (chosen * LAYERS)[: max(LAYERS, len(chosen))]
    picked = {
        name: _shrink_entries(name, [values[index] for index in chosen])
        for name, values in lists.items()
    }
    name = next(n for n in counts if hasattr(config, n))
    return picked | {name: len(chosen)}


def _shrink_entries(name: str, values: list[Any]) -> list[Any]:
    """A list with one size for each layer, each as small as that field is in other configs."""
    small = [_shrink_field(name, value, iter(())) for value in values]
    return [value if new is None else new for value, new in zip(values, small, strict=True)]


# What the rules do not get right: type → fields; "" holds fields without which the class builds no
# config to start from.
DECODER = {"is_decoder": True}
NO_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
DOTS = {
    "num_key_value_heads": 8,
    "head_dim": 16,
    **{f"swa_num_{name}_heads": 8 for name in ("attention", "key_value")},
    **{f"swa_{name}_lora_rank": 24 for name in ("q", "kv")},
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
BY_HAND: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    # Shorter texts than its blocks take make it swap its attention as it runs; the config says so.
    "big_bird": DECODER | {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": DOTS,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": DOTS,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    # Its tower is of timm, which must be installed; the default one has 300 million parameters.
    "gemma3n": {
        "text_config": {"num_kv_shared_layers": 0},
        "vision_config": {"architecture": "test_resnet", "hidden_size": 64},
        "audio_config": {"conf_num_hidden_layers": 1},
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {
        "": {"text_config": NO_INPUTS | {"num_kv_shared_layers": 30}},
        "text_config": {"num_kv_shared_layers": 4},
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 4}},
    "got_ocr2": {
        "vision_config": {
            "mlp_dim": 96,
            "output_channels": 16,
            "image_size": 64,
            "global_attn_indexes": [1, 3],
        }
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"text_config": {"intermediate_size_mlp": 96}},
    "llama4_text": {"intermediate_size_mlp": 96},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "phi4_multimodal": {
        "audio_config": {
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
            "depthwise_separable_out_channel": 32,
        },
        "vision_config": {"image_size": 56, "crop_size": 56},
    },
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": DECODER
    | {
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [8, 16],
        "attention_head_size": 8,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 16, "mamba_headdim": 16},
}
