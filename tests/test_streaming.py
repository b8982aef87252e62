"""Models whose layers come from disk one by one, against the same models loaded whole."""

import pytest
import torch
from conftest import token_ids
from test_families import CASES, build

import prunekit
from prunekit import config as cfg
from prunekit.machine import Stages
from prunekit.pipeline import Places, prune_model
from prunekit.streaming import Streamed

FIRST = dict(reversed(CASES))


@pytest.mark.parametrize("family", ["olmo2", "qwen3", "opt", "gpt_neox", "cohere"])  # olmo2's heads share a norm
def test_streamed_equals_whole(family, tmp_path):
    ids = token_ids(16, 12)
    model = build(family, FIRST[family], "sdpa", "eager")
    prunekit.save_pretrained(model, tmp_path / "dense")
    config = cfg.check(cfg.compose(["ratio=0.3", "output_dir=none"]))
    batches = [{"input_ids": part, "use_cache": False} for part in ids.split(6)]
    streamed = Streamed(tmp_path / "dense", torch.device("cpu"), None, False)
    places = Places(model=tmp_path / "pruned")
    result = prune_model(streamed.model, config, batches, Stages(torch.device("cpu")), None, places, streamed)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    streamed.writer.finish(streamed.model)
    whole = prunekit.from_pretrained(tmp_path / "dense")
    assert prune_model(whole, config, batches, Stages(torch.device("cpu"))).plan == result.plan
    loaded = prunekit.from_pretrained(tmp_path / "pruned").state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, loaded[name]), name
