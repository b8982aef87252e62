"""Small models of every architecture that the tests know, by the sizes of their configurations."""

import torch
from conftest import randomise
from transformers import AutoConfig, AutoModelForCausalLM

IDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
NEW = IDS | {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
NAMED = NEW | {"head_dim": 6}
WIDE = NEW | {"hidden_size": 64}  # an even number of rotary dimensions
GPT2 = IDS | {"n_embd": 48, "n_head": 8, "n_layer": 2, "n_positions": 64}
FALCON = IDS | {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "ffn_hidden_size": 40,
}

# Families with a free number of key-value heads.
GROUPED = {
    "llama": NAMED,
    "mistral": NAMED,
    "qwen2": NEW,
    "qwen3": NAMED,
    "phi3": NEW,
    "phi": WIDE,
    "gemma2": NAMED,
    "gemma3_text": NAMED,
    "granite": NEW,
    "cohere": NEW,
    "glm": NEW | {"head_dim": 8},
    "olmo": NEW,
    "olmo2": NEW,
    "stablelm": WIDE,
    "starcoder2": NEW,
    "helium": NAMED,
    "ernie4_5": NAMED,
    "smollm3": NEW,
    "falcon": FALCON | {"new_decoder_architecture": True},
}
# Families with as many key-value heads as query heads, or with one; what follows a colon only
# tells variants of one family apart.
SINGLE = {
    "gpt2": GPT2,
    "gpt_neo": IDS
    | {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 8,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gptj": GPT2 | {"n_head": 4, "rotary_dim": 8},
    "gpt_neox": WIDE,
    "opt": NEW | {"ffn_dim": 40, "word_embed_proj_dim": 48},
    "bloom": IDS | {"hidden_size": 48, "n_layer": 2, "n_head": 8},
    "falcon": FALCON | {"multi_query": True},
    "falcon:dense": FALCON | {"multi_query": False, "parallel_attn": False},
    "falcon:alibi": FALCON | {"multi_query": False, "alibi": True},
    "xglm": IDS
    | {
        "d_model": 48,
        "ffn_dim": 40,
        "num_layers": 2,
        "attention_heads": 8,
        "max_position_embeddings": 64,
    },
    "biogpt": NEW,
}
EXPERTS = {
    "mixtral": NEW | {"num_local_experts": 4},
    "qwen2_moe": NEW
    | {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": NAMED | {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
}
ALL = [*dict.fromkeys([*GROUPED, *SINGLE, *EXPERTS])]
EAGER_ONLY = ("bloom", "gemma2", "gpt_neo", "gptj", "xglm")


def _cases():
    for position, (family, values) in enumerate(GROUPED.items()):
        for heads in (8 if position % 2 == 0 else 1, 2):
            yield family, values | {"num_key_value_heads": heads, "num_kv_heads": heads}
    yield from SINGLE.items()
    for family, values in EXPERTS.items():
        for heads in (8, 2):
            yield family, values | {"num_key_value_heads": heads}


CASES = [*_cases()]  # (family, sizes), each family with two numbers of key-value heads
# family → the sizes of a case, with as many key-value heads as query heads where it has a choice.
FIRST = dict(reversed(CASES)) | {
    family: values | {"num_key_value_heads": 8, "num_kv_heads": 8}
    for family, values in GROUPED.items()
}


def values_of(family):
    """The sizes of the family's model with four key-value heads, where it has a choice."""
    if family in SINGLE and family != "falcon":
        return SINGLE[family]
    return (GROUPED | EXPERTS)[family] | {"num_key_value_heads": 4, "num_kv_heads": 4}


SLIDING = {"sliding_window": 4}
# Families whose layers differ from one another, at five layers.
MORE = {
    "cohere2": NAMED | SLIDING | {"num_key_value_heads": 4},
    "gemma2": values_of("gemma2") | SLIDING,
    "gemma3_text": values_of("gemma3_text") | SLIDING | {"sliding_window_pattern": 2},
    "qwen2": values_of("qwen2") | SLIDING | {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": values_of("qwen2_moe") | {"mlp_only_layers": [0, 2]},
    "gpt_neo": SINGLE["gpt_neo"]
    | {"attention_types": [[["global", "local"], 2], [["local"], 1]], "window_size": 4},
    "glm4_moe": NAMED
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "moe_intermediate_size": 24,
        "topk_group": 1,
        "first_k_dense_replace": 2,
    },
    "qwen3_moe": values_of("qwen3_moe") | {"mlp_only_layers": [4]},
    "smollm3": values_of("smollm3") | {"no_rope_layer_interval": 2},
}
DEEP = [*dict.fromkeys([*ALL, *MORE])]


def implementations(family):
    """The attention implementations that the family has in transformers."""
    return ("eager",) if family in EAGER_ONLY else ("sdpa", "eager")


def alternate(families):
    """(family, attention implementation), in turn one and the other where the family has both."""
    for position, family in enumerate(families):
        available = implementations(family)
        yield family, available[(position + 1) % len(available)]


def build(family, values, *wanted):
    """A model of random numbers with the first of the wanted attention implementations it has."""
    available = [name for name in wanted or ("sdpa", "eager") if name in implementations(family)]
    return build_with(family, values, available[0])


def build_with(family, values, attention):
    """A model of random numbers with this attention implementation."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split(":")[0], **values)
    return randomise(AutoModelForCausalLM.from_config(config, attn_implementation=attention))


def layers_of(family):
    """How many layers `build_deep` gives the family: five where they differ from one another."""
    return 5 if family in MORE else 4


def build_deep(family, *wanted, layers=None, **more):
    """A model of the family with more layers."""
    layers = layers or layers_of(family)
    values = MORE[family] if family in MORE else values_of(family)
    names = [name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in values]
    return build(family, values | {names[0]: layers} | more, *wanted)


def narrow_heads(graph):
    """A plan that takes two positions off every head's query, key and value."""
    removed = {}
    for extent in graph.extents:
        owned = {
            name: index
            for name, index in extent.owned.items()
            if graph[name].kind == "head_dim" and graph[name].prunable
        }
        wanted = extent.quantity in ("qk_head_dim", "v_head_dim")
        if wanted and owned and not owned.keys() & removed.keys():
            # Rotary pairs where there are any.
            name, index = max(owned.items(), key=lambda item: item[1].shape[1])
            removed[name] = list(range(2 // index.shape[1]))
    return removed
