"""Uniform and aligned shapes: what the model's own class can hold, what hardware and quantizers
want.
"""

import pytest
import torch
from conftest import example, randomise, tiny_llama, token_ids
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import prunekit
from prunekit.errors import ConfigError
from prunekit.surgery.shapes import find_multiples, find_stock_counts

SIZES = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8}


def models():
    yield "llama", tiny_llama()
    more = {"num_key_value_heads": 4, "max_position_embeddings": 64, "intermediate_size": 40}
    yield "qwen2", Qwen2ForCausalLM(Qwen2Config(**SIZES, **more))
    yield "mixtral", MixtralForCausalLM(MixtralConfig(**SIZES, **more, num_local_experts=4))
    yield (
        "gpt2",
        GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=8, n_positions=64)),
    )


@pytest.mark.parametrize(("family", "model"), models(), ids=[name for name, _ in models()])
@pytest.mark.parametrize("method", ["slimgpt", "llm_pruner"])
def test_uniform_models_load_without_us(family, model, method, tmp_path):
    randomise(model, 0.05)
    result = prunekit.prune(
        model, method=method, ratio=0.15, calibration=token_ids(8, 12), overrides=["shapes=uniform"]
    )
    removed = {name: len(units) for name, units in result.plan.removed.items()}
    for kind in ("attention", "mlp"):
        cut = {removed.get(group.name, 0) for group in result.graph.groups if group.kind == kind}
        assert len(cut) == 1, removed
    assert removed
    prunekit.save_pretrained(model, tmp_path / "model")
    loaded, problems = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert type(loaded).__module__.startswith("transformers.models.")
    assert not any(problems[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = token_ids()
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_numbers_of_heads_that_a_class_can_hold():
    gpt2 = dict(models())["gpt2"]
    graph = prunekit.trace(gpt2, example())
    heads = [group for group in graph.groups if group.kind == "attention"]
    with pytest.raises(ConfigError, match="no number of units but the dense model's"):
        find_stock_counts(gpt2, graph, heads)  # its class derives the heads' width
    llama = tiny_llama(kv_heads=8)
    graph = prunekit.trace(llama, example())
    heads = [group for group in graph.groups if group.kind == "attention"]
    assert {frozenset(kept) for kept in find_stock_counts(llama, graph, heads).values()} == {
        frozenset(
            n for n in range(1, 8) if 48 % n == 0
        )  # its config wants them to divide the hidden size
    }


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_uniform_channels_load_without_us(family, tmp_path):
    model = randomise(dict(models())[family], 0.05)
    options = ["shapes=uniform", "policy=uniform", "groups=channel"]
    result = prunekit.prune(
        model, method="magnitude", ratio=0.15, calibration=token_ids(8, 12), overrides=options
    )
    assert result.plan.removed
    prunekit.save_pretrained(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model)
    assert torch.equal(
        loaded(input_ids=token_ids()).logits, model.eval()(input_ids=token_ids()).logits
    )


@pytest.mark.parametrize(
    ("family", "groups", "message"),
    [
        ("gpt2", "channel", "no number of units but the dense model's"),
        ("llama", "head_dim", r"out of reach: .*\(shapes=uniform\)"),
        ("llama", "[attention,mlp,channel]", "expected heads, their width or channels to be cut"),
    ],
)
def test_what_a_class_cannot_hold_is_refused_before_anything_is_done(family, groups, message):
    with pytest.raises(ConfigError, match=message):
        prunekit.prune(
            dict(models())[family],
            method="magnitude",
            calibration=token_ids(8, 12),
            overrides=["shapes=uniform", "policy=uniform", f"groups={groups}"],
        )


def wide_llama():
    more = {
        "num_key_value_heads": 8,
        "max_position_embeddings": 64,
        "intermediate_size": 320,
        "head_dim": 6,
    }
    return randomise(
        LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 4}, **more)), 0.05
    )


@pytest.mark.parametrize(("multiple", "expected"), [(8, 8), (1, 64)])
def test_aligned_widths(multiple, expected):
    model = wide_llama()
    options = ["shapes=aligned", f"scope.width_multiple={multiple}", "policy=linear_increase"]
    result = prunekit.prune(model, ratio=0.3, calibration=token_ids(8, 12), overrides=options)
    widths = {
        (layer.mlp.down_proj.in_features, layer.self_attn.o_proj.in_features)
        for layer in model.model.layers
    }
    assert len(widths) > 1
    assert all(mlp % expected == 0 for mlp, _ in widths)
    assert all(heads % expected == 0 or heads == 48 for _, heads in widths)
    sides = find_multiples(result.graph.groups, expected)
    assert {sides[group.name] for group in result.graph.groups if group.kind == "mlp"} == {expected}


def test_a_layer_that_stays_whole_is_no_uniform_shape():
    with pytest.raises(
        ConfigError, match=r"shapes=uniform: layers.1.mlp stays whole \(scope.exclude\)"
    ):
        prunekit.prune(
            tiny_llama(),
            calibration=token_ids(8, 12),
            overrides=["shapes=uniform", "scope.exclude=[layers.1.mlp]"],
        )
    with pytest.raises(ConfigError, match="shapes: unknown choice 'round'"):
        prunekit.prune(tiny_llama(), calibration=token_ids(8, 12), overrides=["shapes=round"])
