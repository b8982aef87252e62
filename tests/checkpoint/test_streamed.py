"""Models whose layers come from disk one by one, against the same models loaded whole."""

import pytest
import torch
from conftest import token_ids
from families import EXPERTS, FIRST, MORE, NAMED, build

import prunekit
from prunekit import config as cfg
from prunekit.checkpoint import LayerWriter, Shards
from prunekit.checkpoint.streamed import Streamed
from prunekit.pipeline import prune_model
from prunekit.runtime.stages import Stages
from prunekit.schedules.folders import Folders
from prunekit.schedules.method import Method

ONE_BY_ONE = {  # families whose checkpoints hold experts one by one
    "mixtral": EXPERTS["mixtral"] | {"num_key_value_heads": 2},
    "qwen2_moe": EXPERTS["qwen2_moe"] | {"num_key_value_heads": 8},
    "qwen3_moe": MORE["qwen3_moe"]
    | {"num_experts": 12, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "olmoe": NAMED | {"num_key_value_heads": 4, "num_experts": 3, "num_experts_per_tok": 2},
    "glm4_moe": MORE["glm4_moe"] | {"num_hidden_layers": 3, "first_k_dense_replace": 1},
}
BATCHES = [{"input_ids": part, "use_cache": False} for part in token_ids(16, 12).split(6)]
CPU = torch.device("cpu")


def stream(folder, *overrides):
    """Prune the model in `folder/dense` layer by layer into `folder/pruned`."""
    config = cfg.check(cfg.compose(["output_dir=none", *overrides]))
    streamed = Streamed(folder / "dense", CPU, None, False)
    folders = Folders(model=folder / "pruned", state=folder / "state")
    method = Method.build(config)
    result = prune_model(
        streamed.model, config, method, BATCHES, Stages(CPU), folders=folders, streamed=streamed
    )
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    streamed.writer.finish(streamed.model)
    return result


def assert_equals_whole(folder, *overrides):
    """What was streamed is what pruning the whole model leaves, bit for bit."""
    result = stream(folder, *overrides)
    whole = prunekit.from_pretrained(folder / "dense")
    config = cfg.check(cfg.compose(["output_dir=none", *overrides]))
    assert (
        prune_model(whole, config, Method.build(config), BATCHES, Stages(CPU)).plan == result.plan
    )
    assert_same(prunekit.from_pretrained(folder / "pruned"), whole)
    return whole


def assert_same(loaded, whole):
    tensors = loaded.state_dict()
    assert tensors.keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(**BATCHES[0]).logits, whole(**BATCHES[0]).logits)


@pytest.mark.parametrize(
    "family", ["olmo2", "qwen3", "opt", "gpt_neox", "cohere"]
)  # olmo2's heads share a norm
def test_streamed_equals_whole(family, tmp_path):
    prunekit.save_pretrained(build(family, FIRST[family], "sdpa", "eager"), tmp_path / "dense")
    assert_equals_whole(tmp_path, "ratio=0.3")


def saved(family, folder):
    """A model whose experts are stored one by one, those of a layer in several files."""
    model = build(family, ONE_BY_ONE[family])
    model.save_pretrained(folder / "dense", max_shard_size="20KB")
    shards = Shards.of_folder(folder / "dense")
    files = {shards[name].file for name in shards if ".layers.0." in name or ".layers.2." in name}
    assert len(files) > 1 and any(".experts.2." in name for name in shards)
    assert not any(name.endswith("experts.gate_up_proj") for name in shards)
    return model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(
            (family, ["ratio=0.3"]) for family in ONE_BY_ONE if family != "glm4_moe"
        ),  # which has one name for two widths
        ("mixtral", ["groups=mlp", "ratio=0.3"]),
        ("qwen3_moe", ["groups=mlp", "policy=uniform"]),  # of all layers alike, the dense one too
        *(
            (family, ["groups=attention", "ratio=0.05"]) for family in ONE_BY_ONE
        ),  # experts are only copied
    ],
)
def test_experts_stored_one_by_one(family, options, tmp_path):
    model = saved(family, tmp_path)
    whole = assert_equals_whole(tmp_path, *options)
    assert sum(p.numel() for p in whole.parameters()) < 0.96 * sum(
        p.numel() for p in model.parameters()
    )


def test_experts_of_a_broken_run(tmp_path, monkeypatch):
    saved("qwen3_moe", tmp_path)
    write = LayerWriter.write

    def breaks(self, key, tensors):
        if key.endswith("layers.1"):
            raise KeyboardInterrupt
        write(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerWriter, "write", breaks)
        stream(tmp_path, "ratio=0.3")
    assert (tmp_path / "state").exists() and not (tmp_path / "pruned").exists()
    assert_equals_whole(tmp_path, "ratio=0.3", "resume=true")
