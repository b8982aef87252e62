"""Uniform and aligned shapes: what the model's own class can hold, what hardware and quantizers
want.
"""

from dataclasses import replace

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
from prunekit.report.markdown import render_markdown
from prunekit.surgery.shapes import choose_step, find_stock_counts

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
        ("llama", "head_dim", "no number of units but the dense model's"),
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


def test_steps_of_dense_widths():
    widths = [11008, 4096, 2048, 2047, 1536, 640, 172, 128, 127, 64, 40, 6]
    assert [choose_step(w) for w in widths] == [128, 128, 128, 64, 64, 32, 8, 8, 1, 1, 1, 1]


def test_widths_are_aligned_by_default():
    model = wide_llama()
    dense = sum(p.numel() for p in model.parameters())
    options = ["policy=linear_increase"]
    result = prunekit.prune(model, ratio=0.3, calibration=token_ids(8, 12), overrides=options)
    widths = {layer.mlp.down_proj.in_features for layer in model.model.layers}
    assert len(widths) > 1
    assert all(width % 16 == 0 for width in widths)
    heads = {layer.self_attn.o_proj.in_features for layer in model.model.layers}
    assert any(width % 16 for width in heads)  # heads are counted
    assert result.report["steps"] == {"attention": 1, "mlp": 16}
    text = render_markdown(replace(result.report, models=("dense", "pruned")))
    assert "keeps all of its units or a multiple of: 16 (mlp)." in text
    pruned = sum(p.numel() for p in model.parameters())
    assert abs(dense - pruned - 0.3 * dense) <= 16 * 3 * 48 / 2


@pytest.mark.parametrize("multiple", [8, 64])
@pytest.mark.parametrize("shapes", ["aligned", "free"])
def test_a_multiple_of_ones_own_divides_every_width(multiple, shapes):
    model = wide_llama()
    options = [f"shapes={shapes}", f"scope.width_multiple={multiple}", "policy=linear_increase"]
    prunekit.prune(
        model, method="magnitude", ratio=0.3, calibration=token_ids(8, 12), overrides=options
    )
    widths = {
        (layer.mlp.down_proj.in_features, layer.self_attn.o_proj.in_features)
        for layer in model.model.layers
    }
    assert len(widths) > 1
    assert all(mlp % multiple == 0 for mlp, _ in widths)
    assert all(heads % multiple == 0 or heads == 48 for _, heads in widths)


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
