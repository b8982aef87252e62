import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import command_line, example, randomise, tiny_llama, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.demo import DEMO_MODEL
from prunekit.errors import ExportError
from prunekit.exports import onnx as target
from prunekit.exports.onnx import Onnx

for package in ("onnx", "onnxscript"):
    pytest.importorskip(package)
onnxruntime = pytest.importorskip("onnxruntime")
SIZES = {
    "vocab_size": 97,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
SHAPES = ((1, 1), (1, 23), (3, 11))
SMALL = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 1}


def build(family, **values):
    torch.manual_seed(0)
    return randomise(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | values))
    )


def cut(model, removed):
    graph = prunekit.trace(model, example())
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    return model


CASES = {
    "llama": lambda: cut(
        tiny_llama(layers=2), {"layers.0.self_attn": [1], "layers.1.mlp": [0, 3, 7]}
    ),
    "qwen2": lambda: cut(
        build("qwen2", **SIZES), {"layers.0.self_attn": [0, 2], "layers.1.mlp": [1]}
    ),
    "gpt2": lambda: cut(
        build("gpt2", n_embd=48, n_layer=1, n_head=6, n_positions=64),
        {"h.0.attn": [2], "h.0.mlp": [0, 5, 9]},
    ),
    "emptied": lambda: cut(
        tiny_llama(layers=3),
        {
            "layers.0.self_attn": range(4),
            "layers.1.mlp": range(40),
            "layers.2.self_attn": range(4),
            "layers.2.mlp": range(40),
        },
    ),
    "mixtral": lambda: cut(
        build("mixtral", **SIZES | {"num_local_experts": 4, "num_hidden_layers": 1}),
        {"layers.0.self_attn": [1]},
    ),
}


@torch.no_grad()
def off(model, file, rows, length):
    """The largest difference of onnxruntime's logits over torch's largest; left-padded where it can
    be.
    """
    session = onnxruntime.InferenceSession(file)
    given = {"input_ids": token_ids(rows, length, seed=3)}
    if len(session.get_inputs()) > 1:
        given["attention_mask"] = (torch.arange(length) >= torch.arange(rows)[:, None]).long()
    found = torch.from_numpy(
        session.run(None, {name: value.numpy() for name, value in given.items()})[0]
    ).float()
    expected = model(**given, use_cache=False).logits.float()
    assert found.shape == expected.shape
    real = given.get("attention_mask", torch.ones(rows, length)).bool()
    return ((found - expected)[real].abs().max() / expected.abs().max()).item()


@torch.no_grad()
def off_with_cache(model, file):
    """As `off`, of five tokens, then of two, then of one, with what was kept of those before."""
    session = onnxruntime.InferenceSession(file)
    ids, mask = token_ids(3, 8, seed=3), torch.arange(8) >= torch.arange(3)[:, None]
    given = {"input_ids": ids, "attention_mask": mask.long()}
    given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(**given, use_cache=False).logits
    sizes = {entry.name: entry.shape for entry in session.get_inputs()[3:]}
    kept = {n: torch.zeros(3, heads, 0, width).numpy() for n, (_, heads, _, width) in sizes.items()}
    names = [entry.name for entry in session.get_outputs()]
    assert names[1:] == [name.replace("past_key_values", "present") for name in kept]
    worst = 0.0
    for begin, end in ((0, 5), (5, 7), (7, 8)):
        tokens = {name: value[:, begin:end].numpy() for name, value in given.items()}
        tokens["attention_mask"] = given["attention_mask"][:, :end].numpy()
        logits, *presents = session.run(None, tokens | kept)
        kept = dict(zip(kept, presents, strict=True))
        real, off = mask[:, begin:end], torch.from_numpy(logits) - expected[:, begin:end]
        worst = max(worst, off[real].abs().max().item())
    return worst / expected.abs().max().item()


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mixtral"])
def test_onnxruntime_computes_the_same(name, tmp_path):
    model = CASES[name]()
    file = Onnx(check=False).write(model, None, tmp_path / "new")
    assert [path.name for path in file.parent.iterdir()] == ["model.onnx"]
    assert max(off(model, file, rows, length) for rows, length in SHAPES) < 2e-5


def test_a_cache_of_layers_with_and_without_attention(tmp_path):
    model = CASES["emptied"]()
    file = Onnx(cache=True, check=False).write(model, None, tmp_path)
    assert off_with_cache(model, file) < 2e-5
    written = json.loads(file.with_name("genai_config.json").read_text())["model"]["decoder"]
    assert (written["num_hidden_layers"], written["filename"]) == (3, "model.onnx")
    assert written["inputs"]["past_value_names"] % 2 == "past_key_values.2.value"


def test_weights_beside_the_graph_half_and_no_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(target, "LARGEST", 100)
    model = tiny_llama(layers=1)
    file = Onnx(dtype="float16", attention_mask=False, opset=18).write(model, None, tmp_path)
    assert sorted(path.name for path in file.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert model.dtype == torch.float32
    assert off(model, file, 2, 13) < 2e-2
    session = onnxruntime.InferenceSession(file)
    assert [entry.name for entry in session.get_inputs()] == ["input_ids"]
    assert session.get_outputs()[0].type == "tensor(float16)"


class Deciding(nn.Module):
    """A model whose way depends on a number, which no graph can hold."""

    config = device = None

    def forward(self, input_ids, use_cache=False):
        return input_ids if input_ids.sum().item() > 3 else -input_ids


def test_what_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="expected 18 to 23, got 7"):
        Onnx(opset=7)
    with pytest.raises(ExportError, match="did you mean float16"):
        Onnx(dtype="bfloat16")
    with pytest.raises(ExportError, match="expected export.attention_mask=true"):
        Onnx(cache=True, attention_mask=False)
    with pytest.raises(ExportError, match="MambaForCausalLM, got nothing"):
        small = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1}
        Onnx(cache=True).write(build("mamba", **small), None, tmp_path)
    with pytest.raises(ExportError, match="expected a causal language model, got Linear"):
        Onnx().write(nn.Linear(2, 2), None, tmp_path)
    model = Deciding()
    model.config = AutoConfig.for_model("llama", **SIZES)
    with pytest.raises(ExportError, match="torch can't export Deciding") as caught:
        Onnx().write(model, None, tmp_path)
    assert "\n" not in str(caught.value)
    model = CASES["llama"]()
    monkeypatch.setattr(
        target,
        "_export_program",
        lambda *_: SimpleNamespace(save=lambda file, **_: file.write_bytes(b"")),
    )
    with pytest.raises(ExportError, match="onnxruntime can't run the graph"):
        Onnx().write(model, None, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(target, "_measure_difference", lambda *_: float("nan"))
        with pytest.raises(ExportError, match="onnxruntime's logits are off by nan"):
            Onnx().write(model, None, tmp_path)
    assert not any(tmp_path.iterdir())
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "file").touch()
    with pytest.raises(ExportError, match="exists already"):
        Onnx().write(model, None, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ExportError, match=r"needs the package onnxscript: pip install prunekit\[onnx\]"
    ):
        Onnx().write(model, None, tmp_path)


def test_from_the_command_line(tmp_path):
    prunekit.save_pretrained(
        tiny_llama(layers=1), tmp_path / "model", prunekit.checkpoint.load_tokenizer(DEMO_MODEL)
    )
    asked = ["task=export", "export=onnx", "export.cache=true", "model.path=model"]
    run = command_line(*asked, "output_dir=out", cwd=tmp_path)
    assert not run.returncode, run.stderr
    assert "onnxruntime's logits within" in run.stdout + run.stderr
    file = tmp_path / "out" / "onnx" / "model.onnx"
    assert off_with_cache(prunekit.from_pretrained(tmp_path / "model"), file) < 2e-5
    assert file.with_name("tokenizer.json").exists()
