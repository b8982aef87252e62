"""Architectures the tracer was never told about: pruned equals masked, and the saved folder gives the same bits."""

import copy

import pytest
import torch
from conftest import token_ids
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
    for name, units in removed.items():
        for member in graph[name].consumers:
            masked.get_parameter(member.parameter).data.index_fill_(member.dim, member.index[units].flatten(), 0)
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
