"""Dense models whose class gives layers sizes of their own, by the key that prunekit uses."""

import json

import pytest
import torch
from conftest import randomise, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.model.modeling_prunekit import per_layer_overrides

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "global_head_dim": 12,
    "num_global_key_value_heads": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 6,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 97,
    "max_position_embeddings": 64,
}
IDS = token_ids(4, 12)


ALIKE = {"global_head_dim": 6, "num_global_key_value_heads": 4}  # as in the other layers


def build(**changed):
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma4_text", **SIZES | changed)
    return randomise(AutoModelForCausalLM.from_config(config), 0.05)


@pytest.fixture
def dense():
    return build()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def test_a_dense_folder_is_loaded_as_transformers_does(dense, tmp_path):
    dense.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["per_layer_config"]
    assert torch.equal(logits(prunekit.from_pretrained(tmp_path / "model")), logits(dense))


def test_a_dense_model_is_saved(dense, tmp_path):
    prunekit.save_pretrained(dense, tmp_path / "model")
    for load in (prunekit.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path / "model")), logits(dense))


@pytest.mark.parametrize("policy", ["uniform", "linear_increase"])
@pytest.mark.parametrize("changed", [{}, ALIKE], ids=["own sizes", "all alike"])
def test_a_pruned_model_is_saved(changed, policy, tmp_path):
    dense = build(**changed)
    assert bool(per_layer_overrides(dense.config)) == (not changed)
    settings = {"calibration": IDS, "overrides": [f"policy={policy}"]}
    prunekit.prune(dense, ratio=0.1, **settings)
    for number in range(2):
        prunekit.save_pretrained(dense, tmp_path / str(number))
        again = prunekit.from_pretrained(tmp_path / str(number))
        assert torch.equal(logits(again), logits(dense))
        dense = again
        prunekit.prune(dense, ratio=0.1, **settings)
