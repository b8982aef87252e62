import pytest
import torch
from conftest import example, tiny_llama, token_ids
from torch import nn

import prunekit
from prunekit.errors import ConfigError, DataError
from prunekit.graph import trace
from prunekit.importance import Magnitude, Obs, Random, TaylorFirst


def loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batches(ids, size=2):
    return [{"input_ids": chunk, "use_cache": False} for chunk in ids.split(size)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_taylor_from_finite_differences_is_credited_to_the_right_unit(kv_heads):
    """Σ |g w| over what a KV head owns, g by central differences in float64; a (rep, kv) mix-up would fail here."""
    model = tiny_llama(kv_heads, layers=1).double()  # its norms still compute in float32: hence the step of 1e-3
    graph = trace(model, example())
    ids = token_ids(5, 6)
    group = graph["layers.0.self_attn"]
    scores = TaylorFirst().score(model, graph, [group], batches(ids))[group.name]
    expected = torch.zeros(group.num_units, dtype=torch.float64)
    with torch.no_grad():
        for member in group.members:
            weight = model.get_parameter(member.parameter).data
            for unit, positions in enumerate(member.index):
                rows = weight.movedim(member.dim, 0)
                for position in positions:
                    row = rows[position].view(-1)
                    for k in range(row.numel()):
                        old = row[k].item()
                        row[k] = old + 1e-3
                        up = loss(model, ids)
                        row[k] = old - 1e-3
                        down = loss(model, ids)
                        row[k] = old
                        expected[unit] += abs((up - down).item() / 2e-3 * old)
    torch.testing.assert_close(scores, expected, rtol=5e-3, atol=1e-6)


def test_taylor_leaves_the_model_as_it_was_and_ignores_padding():
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    graph = trace(model, example())
    group = graph["layers.0.mlp"]
    ids = token_ids(2, 8)
    short = TaylorFirst().score(model, graph, [group], [{"input_ids": ids[:1, :5], "use_cache": False}])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    padded = {"input_ids": ids[:1], "attention_mask": mask, "use_cache": False}
    torch.testing.assert_close(
        TaylorFirst().score(model, graph, [group], [padded])[group.name], short[group.name], rtol=1e-4, atol=1e-7
    )
    assert all(p.grad is None for p in model.parameters())
    assert not model.model.norm.weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_taylor_needs_a_loss():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = trace(net, (torch.randn(2, 4),))
    with pytest.raises(DataError, match="scalar `loss`"):
        TaylorFirst().score(net, graph, [graph.groups[0]], [{"input": torch.randn(2, 4)}])


def test_taylor_of_a_module_with_its_own_loss():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.b(self.a(x).relu())
            return {"loss": y.square().mean(), "y": y}

    net = Net()
    result = prunekit.prune(
        net, ratio=0.3, method="llm_pruner", calibration=[{"x": torch.randn(8, 4)}], overrides=["policy=uniform"]
    )
    assert net.a.out_features == net.b.in_features < 6
    assert sum(map(len, result.plan.removed.values())) == 6 - net.a.out_features


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_by_hand(p):
    model = tiny_llama(layers=1)
    graph = trace(model, example())
    group = graph["layers.0.mlp"]
    mlp = model.model.layers[0].mlp
    expected = sum(m.weight.double().abs().pow(p).sum(1) for m in (mlp.gate_proj, mlp.up_proj))
    expected += sum(m.bias.double().abs().pow(p) for m in (mlp.gate_proj, mlp.up_proj))
    expected += mlp.down_proj.weight.double().abs().pow(p).sum(0)
    torch.testing.assert_close(Magnitude(p=p).score(model, graph, [group], [])[group.name], expected.detach())


def test_random_depends_on_seed_and_group_alone():
    graph = trace(tiny_llama(), example())
    a, b = graph["layers.0.mlp"], graph["layers.1.mlp"]
    first, again = (Random(seed=1).score(None, graph, [a, b], []) for _ in range(2))
    assert torch.equal(first[a.name], again[a.name])
    assert torch.equal(first[a.name], Random(seed=1).score(None, graph, [a], [])[a.name])
    assert not torch.equal(first[a.name], first[b.name])
    assert not torch.equal(first[a.name], Random(seed=2).score(None, graph, [a], [])[a.name])


def test_unknown_variants_name_the_known_ones():
    with pytest.raises(ConfigError, match="did you mean exact"):
        Obs(heads="exakt")
    with pytest.raises(ConfigError, match="expected 1 or 2"):
        Magnitude(p=3)
