"""Architectures the tracer was never told about: pruned equals masked, and the saved folder gives the same bits."""

import copy

import pytest
import torch
from conftest import token_ids, zero_consumers
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit

IDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
NEW = IDS | {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
OLD = IDS | {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 64}
GPT2 = IDS | {"n_embd": 48, "n_head": 8, "n_layer": 2, "n_positions": 64}
FAMILIES = {
    "mistral": NEW,
    "qwen2": NEW,
    "qwen3": NEW | {"head_dim": 6},
    "phi3": NEW,
    "gemma2": NEW | {"head_dim": 6},
    "gemma3_text": NEW | {"head_dim": 6},
    "granite": NEW,
    "cohere": NEW,
    "glm": NEW | {"head_dim": 8},
    "olmo": NEW,
    "stablelm": NEW,
    "starcoder2": NEW,
    "helium": NEW | {"head_dim": 6},
    "smollm3": NEW,
    "gpt2": GPT2,
    "gptj": GPT2 | {"n_head": 4, "rotary_dim": 8},
    "gpt_neox": OLD | {"intermediate_size": 40},
    "opt": OLD | {"ffn_dim": 40, "word_embed_proj_dim": 48},
    "biogpt": OLD | {"intermediate_size": 40},
    "bloom": IDS | {"hidden_size": 48, "n_layer": 2, "n_head": 8},
}


def build(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_masked_and_survives_the_disk(family, tmp_path):
    model = build(family)
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    groups = [group for group in graph.groups if group.prunable and group.exact and group.kind in ("attention", "mlp")]
    kinds = {group.kind for group in groups}
    assert kinds == ({"mlp"} if family == "bloom" else {"attention", "mlp"}), "ALiBi fixes the number of heads"
    removed = {group.name: list(range(1, 2 + group.layer)) for group in groups}
    masked = copy.deepcopy(model)
    zero_consumers(masked, graph, removed)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(
            logits, masked(input_ids=ids).logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item()
        )
        prunekit.save_pretrained(model, tmp_path / "model")
        again = prunekit.from_pretrained(tmp_path / "model")
        again.set_attn_implementation(model.config._attn_implementation)
        assert torch.equal(again(input_ids=ids).logits, logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(ids[:1], **settings), model.generate(ids[:1], use_cache=False, **settings))


EXPERTS = {
    "mixtral": NEW | {"num_local_experts": 4},
    "qwen2_moe": NEW
    | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2},
    "qwen3_moe": NEW | {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 6},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_mixtures_of_experts(family):
    """Heads and all experts' channels can go (in fours: the kernel wants aligned rows), whole experts not yet."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **EXPERTS[family])).eval()
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    experts = [group for group in graph.groups if group.kind == "expert"]
    assert [(group.layer, group.num_units, group.prunable) for group in experts] == [(0, 4, False), (1, 4, False)]
    assert {member.parameter.rsplit(".", 1)[-1] for member in experts[0].members} >= {"gate_up_proj", "down_proj"}
    assert "model.layers.0.mlp.gate.weight" in {member.parameter for member in experts[0].members}
    groups = [group for group in graph.groups if group.prunable and group.kind in ("attention", "mlp")]
    removed = {group.name: [0] if group.kind == "attention" else [1, 3, 5, 6] for group in groups}
    assert sum(group.kind == "mlp" for group in groups) == (4 if family == "qwen2_moe" else 2)
    masked = copy.deepcopy(model)
    zero_consumers(masked, graph, removed)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, masked(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
