"""Snapshots: a group's weights are copied before they change, and all come back after a failure."""

import pytest
import torch
from conftest import example, tiny_llama, token_ids
from torch import nn

import prunekit
from prunekit.errors import SurgeryError
from prunekit.surgery import check, rehearsal
from prunekit.surgery.fault import Fault
from prunekit.surgery.snapshot import Snapshot


def test_only_what_may_change_is_copied_and_the_first_copy_stays():
    model = tiny_llama()
    graph = prunekit.trace(model, example())
    down = model.model.layers[1].mlp.down_proj
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    snapshot = Snapshot(model, everything=False, copies=True)
    for _ in range(2):
        snapshot.keep([graph["layers.1.mlp"]])
        down.weight.data.mul_(2)
        down.bias.data.add_(1)
    model.lm_head.weight.data.mul_(3)
    snapshot.restore()
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"lm_head.weight"}, "no weight of any other group was copied"


@pytest.mark.parametrize("copies", [True, False])
def test_biases_that_were_given_are_noted_and_go_again(copies):
    model = tiny_llama()
    output = model.model.layers[0].self_attn.o_proj
    output.bias = None
    graph = prunekit.trace(model, example())
    snapshot = Snapshot(model, everything=False, copies=copies)
    snapshot.keep([graph["layers.0.self_attn"], graph["layers.2.mlp"]])
    output.bias = nn.Parameter(torch.ones(48))
    snapshot.note_biases()
    assert model.config.extra_biases == ["model.layers.0.self_attn.o_proj"]
    snapshot.restore()
    assert output.bias is None
    assert model.model.layers[2].mlp.down_proj.bias is not None


def test_a_failure_of_the_last_check_puts_the_first_layer_back(monkeypatch):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = []
    keep = Snapshot.keep

    def note(self, groups):
        groups = list(groups)
        kept.append([group.name for group in groups])
        keep(self, groups)

    monkeypatch.setattr(Snapshot, "keep", note)
    monkeypatch.setattr(check, "compare_outputs", lambda *args: Fault(text="differs"))
    monkeypatch.setattr(rehearsal, "_compare", lambda model, graph, groups, batch: graph)
    with pytest.raises(SurgeryError, match="put back"):
        prunekit.prune(model, ratio=0.3, calibration=token_ids(8, 12))
    assert all(len(names) == 1 for names in kept), "group by group"
    assert kept[0][0].startswith("layers.0")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
