import errno
import json

import pytest
import torch
from conftest import tiny_llama, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_python

import prunekit
from prunekit.errors import CheckpointError, PrunekitError

READ = """
import sys, torch, prunekit
from pathlib import Path
ids = torch.load("ids", weights_only=True)
for folder in sorted(Path(".").glob("model*")):
    model = prunekit.from_pretrained(folder)
    with torch.no_grad():
        generated = model.generate(ids[:1, :4], max_new_tokens=6, do_sample=False)
        torch.save([model(input_ids=ids).logits, generated], f"out{folder}")
"""


def pruned(kv_heads=4, tied=False, dtype=torch.float32, ratio=0.3):
    model = tiny_llama(kv_heads, tied=tied, layers=4)
    prunekit.prune(model, ratio=ratio, calibration=token_ids(8, 12))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def test_a_fresh_process_gives_the_same_logits_bit_for_bit(tmp_path):
    ids, models = token_ids(), {}
    for kv_heads, tied in ((8, False), (4, True), (1, False)):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"model{len(models)}"
            models[name] = pruned(kv_heads, tied, dtype)
            prunekit.save_pretrained(models[name], tmp_path / name)
    torch.save(ids, tmp_path / "ids")
    done = run_python(READ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        logits, generated = torch.load(tmp_path / f"out{name}", weights_only=True)
        with torch.no_grad():
            assert torch.equal(logits, model(input_ids=ids).logits)
        assert torch.equal(
            generated, model.generate(ids[:1, :4], max_new_tokens=6, do_sample=False)
        )
        per_layer = json.loads((tmp_path / name / "config.json").read_text())["per_layer_config"]
        widths = {values["intermediate_size"] for values in per_layer.values()}
        assert len(widths) > 1, "layers of different widths are the normal case"


def test_a_loaded_model_can_be_pruned_and_saved_again(tmp_path):
    model = pruned()
    prunekit.save_pretrained(model, tmp_path / "one")
    again = prunekit.from_pretrained(tmp_path / "one")
    prunekit.prune(again, ratio=0.2, calibration=token_ids(8, 12))
    prunekit.save_pretrained(again, tmp_path / "two")
    last = prunekit.from_pretrained(tmp_path / "two")
    ids = token_ids()
    assert torch.equal(last(input_ids=ids).logits, again(input_ids=ids).logits)
    assert sum(p.numel() for p in last.parameters()) < sum(p.numel() for p in model.parameters())
    assert tied_like(last, again)


def tied_like(left, right):
    return [tuple(p.shape) for p in left.parameters()] == [
        tuple(p.shape) for p in right.parameters()
    ]


def test_a_uniformly_pruned_model_is_an_ordinary_one(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama(8)
    graph = prunekit.trace(model, {"input_ids": token_ids(), "use_cache": False})
    removed = {f"layers.{i}.mlp": [i, i + 5] for i in range(3)} | {
        f"layers.{i}.self_attn": [2, 7] for i in range(3)
    }
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    prunekit.save_pretrained(model, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = token_ids()
    assert torch.equal(stock(input_ids=ids).logits, model(input_ids=ids).logits)
    assert (stock.config.num_attention_heads, stock.config.intermediate_size) == (6, 38)


def test_sharded_and_other_dtype(tmp_path):
    model = pruned(tied=True)
    prunekit.save_pretrained(model, tmp_path / "whole")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, tmp_path / "whole" / file)
    (tmp_path / "whole" / "model.safetensors").unlink()
    (tmp_path / "whole" / "prunekit.json").unlink()
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (tmp_path / "whole" / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = token_ids()
    assert torch.equal(
        prunekit.from_pretrained(tmp_path / "whole")(input_ids=ids).logits,
        model(input_ids=ids).logits,
    )
    half = prunekit.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        prunekit.save_pretrained(tiny_llama(), tmp_path / "model")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["precious"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    import safetensors.torch
    import transformers.modeling_utils

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        prunekit.save_pretrained(tiny_llama(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("saved") / "model"
    prunekit.save_pretrained(pruned(), target)
    return target


def damaged(folder, tmp_path, file, change):
    import shutil

    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    path = copy / file
    content = change(path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    return copy


def drop_tensor(content):
    from safetensors.torch import load, save

    tensors = load(content)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    return save(tensors)


def one_row_less(content):
    from safetensors.torch import load, save

    tensors = load(content)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][
        1:
    ].contiguous()
    return save(tensors)


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("config.json", lambda b: None, "config.json is missing"),
        (
            "config.json",
            lambda b: b.replace(b'"intermediate_size": 3', b'"intermediate_size": 2'),
            "not as it was saved",
        ),
        ("model.safetensors", lambda b: None, "model.safetensors is missing"),
        (
            "model.safetensors",
            lambda b: b[: len(b) // 2],
            "model.safetensors is not as it was saved",
        ),
        ("model.safetensors", one_row_less, "model.safetensors is not as it was saved"),
        ("prunekit.json", lambda b: b[:10], "damaged"),
        (
            "prunekit.json",
            lambda b: b.replace(b'"format": 1', b'"format": 2'),
            "expected format 1, got 2",
        ),
    ],
)
def test_damaged_folders(folder, tmp_path, file, change, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        prunekit.from_pretrained(damaged(folder, tmp_path, file, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("config.json", lambda b: None, "expected a config.json"),
        ("config.json", lambda b: b[:100], "config.json: damaged"),
        ("config.json", lambda b: b"[]", "expected a JSON object"),
        ("config.json", lambda b: b.replace(b'"llama"', b'"lama"'), "config.json: damaged"),
        (
            "config.json",
            lambda b: b.replace(b'"per_layer_config": {', b'"per_layer_config": [3], "x": {'),
            "per_layer_config",
        ),
        ("model.safetensors", lambda b: None, "damaged weights"),
        ("model.safetensors", lambda b: b[: len(b) // 2], "damaged weights"),
        ("model.safetensors", drop_tensor, "up_proj.weight is missing"),
    ],
)
def test_damaged_folders_without_a_manifest(folder, tmp_path, file, change, match):
    copy = damaged(folder, tmp_path, file, change)
    (copy / "prunekit.json").unlink()
    with pytest.raises(CheckpointError, match=match) as caught:
        prunekit.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_of_a_pruned_folder(tmp_path):
    from prunekit.checkpoint import load_tokenizer
    from prunekit.demo import DEMO_MODEL

    tokenizer = load_tokenizer(DEMO_MODEL)
    prunekit.save_pretrained(pruned(), tmp_path / "model", tokenizer)
    assert (
        load_tokenizer(tmp_path / "model")("import os")["input_ids"]
        == tokenizer("import os")["input_ids"]
    )


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_pruning_again_down_to_one_key_value_head(tmp_path, kv_heads):
    """Once a layer has one KV head its units are query heads: sizes and bits must still be right
    after a reload.
    """
    model = tiny_llama(kv_heads, layers=2)
    for step, ratio in enumerate((0.3, 0.15, 0.1)):
        prunekit.prune(model, ratio=ratio, method="magnitude", calibration=token_ids(4, 12))
        prunekit.save_pretrained(model, tmp_path / str(step))
        again = prunekit.from_pretrained(tmp_path / str(step))
        assert torch.equal(again(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)
        for layer in range(2):
            attention, own = (
                again.model.layers[layer].self_attn,
                again.config.per_layer_config[layer],
            )
            assert attention.q_proj.out_features == 6 * own.num_attention_heads
            assert attention.k_proj.out_features == 6 * own.num_key_value_heads
            assert (
                attention.num_key_value_groups == own.num_attention_heads // own.num_key_value_heads
            )
            assert (
                model.model.layers[layer].self_attn.num_key_value_groups
                == attention.num_key_value_groups
            )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    position=st.integers(0, 1200),
    byte=st.integers(0, 255),
    file=st.sampled_from(["config.json", "model.safetensors"]),
)
def test_any_damaged_byte_is_a_clean_error_or_loads(folder, tmp_path_factory, position, byte, file):
    def change(content):
        return content[:position] + bytes([byte]) + content[position + 1 :]

    copy = damaged(folder, tmp_path_factory.mktemp("fuzz"), file, change)
    (copy / "prunekit.json").unlink()  # its checksums would see everything
    try:
        prunekit.from_pretrained(copy)
    except PrunekitError as error:
        assert "\n" not in str(error)


def test_a_folder_that_is_missing():
    with pytest.raises(CheckpointError, match="no such model folder"):
        prunekit.from_pretrained("/nowhere/model")


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"an adapter of peft: save .* merge_and_unload"):
        prunekit.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_turned_into_half_precision_is_saved(tmp_path, dtype):
    """Its tables are rounded with it; that is no cut that a folder could not describe."""
    model = pruned().to(dtype)
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(tmp_path / "model")
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_a_width_that_the_heads_do_not_divide_is_loaded(tmp_path):
    model = tiny_llama(layers=2)
    prunekit.prune(
        model,
        ratio=0.2,
        method="llm_pruner",
        calibration=token_ids(),
        overrides=["groups=channel", "policy=uniform"],
    )
    assert model.config.hidden_size % model.config.num_attention_heads
    prunekit.save_pretrained(model, tmp_path / "model")
    ids = token_ids(2, 5)
    with torch.no_grad():
        assert torch.equal(
            prunekit.from_pretrained(tmp_path / "model")(ids).logits, model(ids).logits
        )


def test_a_bias_that_its_class_lacks_is_loaded(tmp_path):
    model = tiny_llama(layers=3)
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = None
    chosen = ["importance=fluctuation", "compensation=bias", "policy=uniform", "groups=mlp"]
    prunekit.prune(model, ratio=0.2, method="llm_pruner", calibration=token_ids(), overrides=chosen)
    prunekit.save_pretrained(model, tmp_path / "model")
    loaded, ids = prunekit.from_pretrained(tmp_path / "model"), token_ids(2, 5)
    assert loaded.model.layers[0].mlp.down_proj.bias.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
