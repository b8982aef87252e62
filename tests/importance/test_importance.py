import pytest
import torch
from conftest import example, tiny_llama

from prunekit.errors import ConfigError
from prunekit.graph import trace
from prunekit.importance import Magnitude, Obs, Random


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
