import json

import pytest
import torch
from recovery_helpers import clone, logits, pruned, run, settings, small, state, texts, tiny_gpt2
from torch import nn

from prunekit.errors import ConfigError
from prunekit.recovery import Recovery, adapters, detach


class Uneven(nn.Module):
    """Linears of another width in every layer, of both kinds, and stacked weights."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.config = self.prepare_inputs_for_generation = None
        self.first, self.second, self.third = (
            nn.Linear(5, 11),
            Conv1D(3, 11),
            nn.Linear(3, 7, bias=False),
        )
        self.experts = nn.Parameter(torch.randn(2, 7, 7))

    def forward(self, x):
        return self.third(self.second(self.first(x)).tanh()) @ self.experts[0]


def filled(wrapped):
    """Random numbers in the adapters: fresh ones change nothing."""
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)


@pytest.mark.parametrize(
    "make", [lambda: pruned(small()), lambda: pruned(tiny_gpt2()), lambda: small(tied=True)]
)
def test_merged_weights_give_the_adapted_logits(make):
    model = make().double()
    names = list(adapters.find_linears(model))
    before, shapes = state(model), {n: p.shape for n, p in model.named_parameters()}
    wrapped = adapters.attach(model, names, Recovery(), "base")
    filled(wrapped)
    model.eval()
    adapted = logits(model)
    adapters.merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-6, atol=1e-6)
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    changed = {
        name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])
    }
    assert changed == {f"{name}.weight" for name in names}
    assert "lm_head" not in names
    tied = model.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_every_width_gets_its_adapter_and_stacked_weights_are_named(monkeypatch):
    said = []
    monkeypatch.setattr("prunekit.recovery.adapters.say", said.append)
    model = Uneven().double()
    inputs = torch.randn(4, 5, dtype=torch.float64)
    filled(
        adapters.attach(
            model, list(adapters.find_linears(model)), Recovery(rank=4, dropout=0.0), "base"
        )
    )
    adapted = model(inputs)
    assert "experts" in said[0] and "no adapter" in said[0]
    adapters.merge(model)
    torch.testing.assert_close(model(inputs), adapted, rtol=1e-6, atol=1e-6)
    assert type(model.second).__name__ == "Conv1D"


def test_half_precision_is_merged_in_float32_and_rounded_once():
    model = small().bfloat16()
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach().clone()
    wrapped = adapters.attach(model, [name], Recovery(), "base")
    filled(wrapped)
    layer = model.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == torch.float32
    expected = (weight.float() + 2.0 * (b @ a)).bfloat16()
    adapters.merge(model)
    torch.testing.assert_close(model.get_submodule(name).weight, expected, rtol=0, atol=0)


def test_targets_come_from_the_caller_or_from_who_owns_them():
    model = small()
    attention = adapters.target_names(model, ("attention",), None)
    mlp = adapters.target_names(model, ("mlp",), None)
    assert all(".self_attn." in name for name in attention) and len(attention) == 8
    assert all(".mlp." in name for name in mlp) and len(mlp) == 6
    assert adapters.target_names(model, ("mlp", "attention"), None) == adapters.target_names(
        model, ("all",), None
    )
    assert adapters.target_names(model, ("mlp",), {"mlp": attention[:1]}) == attention[:1]
    with pytest.raises(ConfigError, match="recovery.targets=mlp: the model has no such linear"):
        adapters.target_names(model, ("mlp",), {"attention": attention})


@pytest.mark.parametrize("lora", [True, False])
def test_only_the_targets_are_trained(tmp_path, lora):
    model = small()
    before = state(model)
    run(model, settings(texts(tmp_path), targets="mlp", epochs=1, lora=lora), tmp_path)
    changed = {
        name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])
    }
    assert changed and all(".mlp." in name for name in changed)


def test_kept_adapters_load_onto_the_pruned_model(tmp_path):
    from peft import PeftModel

    model = pruned(tiny_gpt2())
    plain = clone(model)
    report = run(
        model,
        settings(texts(tmp_path), merge=False, evaluations=0),
        tmp_path / "out",
        base="there/model",
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter"}
    assert {p.suffix for p in (tmp_path / "out" / "adapter").iterdir()} <= {
        ".safetensors",
        ".json",
        ".md",
    }
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (
        "there/model",
        8,
        16,
    )
    loaded = PeftModel.from_pretrained(clone(plain), str(tmp_path / "out" / "adapter")).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(model), logits(plain))
    assert report["trainable_parameters"] == sum(
        p.numel() for n, p in loaded.named_parameters() if "lora_" in n
    )
    assert detach(model) is model
    assert torch.equal(logits(model), logits(plain))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
