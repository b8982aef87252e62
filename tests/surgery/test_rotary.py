"""Rotary frequencies that follow the length of a text: right beyond the model's own length, too."""

import pytest
import torch
from conftest import randomise, tiny_llama, token_ids, zero_units
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.graph import trace

LENGTHS = (9, 100, 12)  # tiny_llama is made for 64 tokens, of which longrope's first ones are 16
FACTORS = {"short_factor": [1.0] * 3, "long_factor": [1.5, 2.0, 3.0]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 8.0}
LONG = {"rope_type": "longrope", "rope_theta": 1000.0, "factor": 4.0, **FACTORS}
LONG["original_max_position_embeddings"] = 16
PHI = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 8, "vocab_size": 97}
PHI |= {"num_hidden_layers": 3, "num_key_value_heads": 4, "max_position_embeddings": 64}


def llama(**rope):
    return tiny_llama(rope_parameters=rope)


def phi(**rope):
    config = AutoConfig.for_model("phi3", **PHI, rope_parameters=rope, pad_token_id=None)
    return randomise(AutoModelForCausalLM.from_config(config))


def logits(model):
    """The logits of texts of different lengths, one after the other."""
    with torch.no_grad():
        return [model(input_ids=token_ids(2, n), use_cache=False).logits for n in LENGTHS]


@pytest.mark.parametrize(
    ("build", "rope"), [(llama, DYNAMIC), (phi, LONG)], ids=["dynamic", "longrope"]
)
def test_a_cut_model_is_right_on_long_texts(build, rope, tmp_path):
    """Layers have other numbers of heads, which the frequencies of a long text must not follow."""
    model = build(**rope)
    long = logits(model)[1]
    fixed = logits(build(rope_type="default", rope_theta=1000.0))[1]
    assert not torch.allclose(long, fixed, atol=1e-3)  # the text is long enough
    settings = {"method": "magnitude", "overrides": ["policy=linear_increase"]}
    result = prunekit.prune(model, ratio=0.2, calibration=token_ids(), **settings)
    assert {layer.self_attn.o_proj.in_features for layer in model.model.layers} > {48}
    dense = build(**rope)
    graph = trace(dense, {"input_ids": token_ids(2, 7), "use_cache": False})
    expected = logits(zero_units(dense, graph, result.plan.removed))
    prunekit.save_pretrained(model, tmp_path / "model", remote_code=True)
    folder = str(tmp_path / "model")
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for one in (model, prunekit.from_pretrained(folder), remote):
        for got, wanted in zip(logits(one), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_width_of_heads_can_not_follow():
    graph = trace(llama(**DYNAMIC), {"input_ids": token_ids(2, 7), "use_cache": False})
    reasons = [g.reason for g in graph.groups if g.kind == "head_dim" and not g.prunable]
    assert any("rotary frequencies are computed anew" in reason for reason in reasons)
