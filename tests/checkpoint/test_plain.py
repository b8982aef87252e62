"""Modules that are none of transformers': saved by weights and sizes, loaded by their factory."""

import json

import pytest
import torch
from conftest import randomise, tiny_llama, token_ids
from torch import nn

import prunekit
from prunekit.errors import CheckpointError, ConfigError


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.width = width

    def forward(self, x):
        return x + self.second(self.norm(self.first(x)).relu())


class Network(nn.Module):
    """A convolutional network with a tied weight and a number that it counts by."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.Sequential(*[Residual(32) for _ in range(3)])
        self.head = nn.Linear(32, 10)
        self.twin = self.head

    def forward(self, x):
        pooled = self.blocks(self.stem(x)).mean((2, 3))
        return self.head(pooled) + self.twin(2 * pooled)


def dense():
    torch.manual_seed(0)
    return randomise(Network(), 0.2).eval()


def images(seed):
    return {"x": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


def prune(groups, **how):
    model = dense()
    overrides = ["policy=uniform", f"groups={groups}", *how.pop("overrides", ())]
    how = {"ratio": 0.3, "method": "magnitude"} | how
    return prunekit.prune(model, calibration=[images(1)], overrides=overrides, **how)


def outputs(model):
    with torch.no_grad():
        return model(**images(2))


@pytest.mark.parametrize("groups", ["channel", "auto"])
def test_a_plain_module_comes_back_bit_for_bit(groups, tmp_path):
    result = prune(groups)
    prunekit.save(result.model, tmp_path / "net", result.plan)
    again = prunekit.load(lambda: Network().requires_grad_(groups == "auto"), tmp_path / "net")
    assert {p.requires_grad for p in again.parameters()} == {groups == "auto"}
    assert torch.equal(outputs(again), outputs(result.model))
    assert again.head.weight is again.twin.weight
    assert again.blocks[0].first.in_channels == again.blocks[0].first.weight.shape[1] < 32
    plan = prunekit.PruningPlan.from_json((tmp_path / "net/plan.json").read_text())
    assert plan.removed == result.plan.removed
    names = sorted(path.name for path in (tmp_path / "net").iterdir())
    assert names == ["model.safetensors", "module.json", "plan.json", "prunekit.json"]


def test_biases_that_a_repair_added_come_back(tmp_path):
    model = prune("channel").model
    model.blocks[0].first.bias = nn.Parameter(torch.randn(len(model.blocks[0].first.weight)))
    prunekit.save(model, tmp_path / "net")
    assert torch.equal(outputs(prunekit.load(Network, tmp_path / "net")), outputs(model))


def test_what_is_no_such_folder_or_module_is_refused(tmp_path):
    prunekit.save(prune("channel").model, tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"expected a folder of prunekit\.save"):
        prunekit.load(Network, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a .*Network, the factory makes a .*Linear"):
        prunekit.load(lambda: nn.Linear(3, 4), tmp_path / "net")
    with pytest.raises(CheckpointError, match="factory: expected a torch module"):
        prunekit.load(dict, tmp_path / "net")
    with pytest.raises(CheckpointError, match="expected what makes the dense module, got a Linear"):
        prunekit.load(nn.Linear(3, 4), tmp_path / "net")
    record = tmp_path / "net/module.json"
    record.write_text(record.read_text().replace("32", "31"))
    with pytest.raises(CheckpointError, match=r"module\.json is not as it was saved"):
        prunekit.load(Network, tmp_path / "net")
    (tmp_path / "net/prunekit.json").unlink()
    record.write_text(json.dumps(json.loads(record.read_text()) | {"attributes": {"a.b": "{"}}))
    with pytest.raises(CheckpointError, match=r"damaged: module\.json"):
        prunekit.load(Network, tmp_path / "net")


def test_a_model_with_layers_of_ones_own_is_kept_as_any_module(tmp_path):
    """Its class of transformers builds others there, so it has no folder of theirs."""

    def make():
        model = tiny_llama()
        for layer in model.model.layers:
            layer.mlp = nn.Sequential(nn.Linear(layer.mlp.hidden_size, 20), nn.ReLU())
            layer.mlp.append(nn.Linear(20, layer.mlp[0].in_features))
        return model

    model, ids = make(), token_ids(4, 9)
    prunekit.prune(model, ratio=0.1, method="magnitude", calibration=ids)
    with pytest.raises(CheckpointError, match=r"another module there: .*; prunekit\.save keeps"):
        prunekit.save_pretrained(model, tmp_path / "model")
    prunekit.save(model, tmp_path / "model")
    loaded = prunekit.load(make, tmp_path / "model")
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_default_groups_of_a_network_without_attention_name_its_channels():
    with pytest.raises(ConfigError, match=r"groups=channel .*groups=auto"):
        prune("mlp")


class Perceptron(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 12))


def test_auto_cuts_hidden_layers_too():
    torch.manual_seed(0)
    result = prunekit.prune(
        Perceptron().eval(),
        ratio=0.5,
        method="magnitude",
        calibration=[{"input": torch.randn(4, 12)}],
        overrides=["policy=uniform", "groups=auto"],
    )
    assert result.report["ratio"]["achieved"] == pytest.approx(0.5, abs=0.02)
