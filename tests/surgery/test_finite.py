"""A model that computes no finite numbers is found before any work, and the place is named."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama, token_ids
from torch import nn

import prunekit
from prunekit.calibration.walk import Walk
from prunekit.errors import DataError


def test_the_first_module_that_gives_other_numbers_is_named(monkeypatch):
    model = tiny_llama(layers=3)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e30)  # finite, but its outputs are not
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e30)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(Walk, "__iter__", lambda walk: pytest.fail("calibration has begun"))
    with pytest.raises(
        DataError, match=r"before anything is cut: model\.layers\.1\.mlp\.down_proj"
    ):
        prunekit.prune(model, ratio=0.2, calibration=token_ids(8, 12))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Normed(nn.Linear):
    """A linear module that divides each column of its weight by its norm."""

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(dim=0), self.bias)


def test_units_without_which_numbers_are_not_finite_are_named():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Normed(8, 3))
    with pytest.raises(DataError, match=r"mlp: .* NaN or infinity where units are masked"):
        prunekit.prune(net, ratio=0.2, method="random", calibration=[{"input": torch.randn(4, 6)}])
