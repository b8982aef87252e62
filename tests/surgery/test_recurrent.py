"""State-space and linear-attention models: their heads are units, beside attention and FFNs."""

import copy

import pytest
import torch
from conftest import randomise, token_ids, zero_units
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
HYBRID = SIZES | {
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
MODELS = {
    "mamba": SIZES | {"state_size": 12, "time_step_rank": 4},
    # As many heads as numbers in a state, as real models have.
    "mamba2": SIZES
    | {"num_heads": 6, "head_dim": 16, "state_size": 6, "n_groups": 3, "chunk_size": 16},
    "bamba": HYBRID
    | {
        "attn_layer_indices": [1],
        "mamba_n_heads": 6,
        "mamba_d_head": 16,
        "mamba_d_state": 12,
        "mamba_chunk_size": 16,
    },
    "granitemoehybrid": HYBRID
    | {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 40,
        "mamba_n_heads": 6,
        "mamba_d_head": 16,
        "mamba_d_state": 12,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
        "mamba_expand": 2,
    },
    "falcon_h1": HYBRID
    | {
        "head_dim": 6,
        "mamba_d_ssm": 96,
        "mamba_n_heads": 6,
        "mamba_d_head": 16,
        "mamba_d_state": 12,
        "mamba_chunk_size": 16,
    },
    "nemotron_h": HYBRID
    | {
        "head_dim": 6,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "mlp", "mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 6,
        "ssm_state_size": 12,
        "n_groups": 2,
        "expand": 1,
    },
    "qwen3_next": HYBRID
    | {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 10,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
    },
}
MIXERS = {  # the group of the first layer's mixer: its kind, its units, whether masking equals it
    "mamba": ("layers.0.mixer", "mlp", 96, True),
    "mamba2": ("layers.0.mixer", "attention", 3, True),
    "bamba": ("layers.0.mamba", "attention", 6, False),
    "granitemoehybrid": ("layers.0.mamba", "attention", 6, False),
    "falcon_h1": ("layers.0.mamba", "attention", 6, True),
    "nemotron_h": ("layers.0.mixer", "attention", 2, True),
    "qwen3_next": ("layers.0.linear_attn", "attention", 3, True),
}
IDS = token_ids(3, 19, seed=2)  # longer than a chunk


@pytest.fixture(scope="module")
def build():
    models = {}

    def build(family):
        if family not in models:
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **MODELS[family])
            models[family] = randomise(AutoModelForCausalLM.from_config(config), 0.1)
        return copy.deepcopy(models[family])

    return build


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", MODELS)
def test_heads_of_a_mixer_are_cut(family, build):
    model = build(family)
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 8), "use_cache": False})
    name, kind, units, exact = MIXERS[family]
    group = graph[name]
    assert (group.kind, group.num_units, group.exact) == (kind, units, exact)
    assert group.prunable
    removed = {name: [1]} | {g.name: [0, 3, 5, 6] for g in graph.groups if g.kind == "mlp"}
    masked = zero_units(build(family), graph, removed)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    assert logits(model).isfinite().all()
    if exact:
        torch.testing.assert_close(logits(model), logits(masked), rtol=1e-4, atol=1e-4)
    generate = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    text = model.generate(IDS[:1], use_cache=False, **generate)
    assert torch.equal(model.generate(IDS[:1], **generate), text)


@pytest.mark.parametrize("family", ["bamba", "falcon_h1"])
def test_a_hybrid_is_saved_and_loaded(family, build, tmp_path):
    """Their configs hold an infinity; tables of FalconH1's mixers are computed by the body."""
    model = build(family)
    overrides = ["data.calibration.batch_size=4"]
    prunekit.prune(
        model, ratio=0.2, method="magnitude", calibration=token_ids(4, 12), overrides=overrides
    )
    prunekit.save_pretrained(model, tmp_path / "model", remote_code=True)
    loaded = prunekit.from_pretrained(tmp_path / "model")
    assert loaded.config.time_step_limit[1] == float("inf")
    assert torch.equal(logits(loaded), logits(model))
    foreign = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert torch.equal(logits(foreign.eval()), logits(model))
