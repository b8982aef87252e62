import pytest
import torch
from conftest import example, tiny_llama

from prunekit.errors import ConfigError
from prunekit.graph import trace
from prunekit.importance import Magnitude, Obs, Random
from prunekit.obs.inverse import Problem, invert, removal_error


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_by_hand(p):
    model = tiny_llama(layers=1)
    graph = trace(model, example())
    group = graph["layers.0.mlp"]
    mlp = model.model.layers[0].mlp
    expected = sum(m.weight.double().abs().pow(p).sum(1) for m in (mlp.gate_proj, mlp.up_proj))
    expected += sum(m.bias.double().abs().pow(p) for m in (mlp.gate_proj, mlp.up_proj))
    expected += mlp.down_proj.weight.double().abs().pow(p).sum(0)
    torch.testing.assert_close(
        Magnitude(p=p).score(model, graph, [group], [])[group.name], expected.detach()
    )


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
    with pytest.raises(ConfigError, match=r"importance\.columns: .*did you mean dynamic_group"):
        Obs(columns="dynamic_groups")
    with pytest.raises(ConfigError, match=r"importance\.refine: .*none, swap"):
        Obs(refine="yes")
    with pytest.raises(ConfigError, match="expected 1 or 2"):
        Magnitude(p=3)


@pytest.mark.parametrize("width", [1, 4])
def test_obs_chooses_by_its_options(width):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 8, generator=generator) @ torch.randn(8, 32, generator=generator)
    weight = torch.randn(8, 32, generator=generator)
    inverse = invert(x.T @ x / 400, 1e-3).matrix
    problem = Problem(weight=weight, inverse=inverse, index=torch.arange(32).view(-1, width))
    options = [
        {"columns": c, "heads": h} for c in ("greedy", "fixed_group") for h in ("exact", "diagonal")
    ]
    for option in options:
        plain, refined = (
            Obs(refine=refine, **option).choose([problem], 16 // width)
            for refine in ("none", "swap")
        )
        assert removal_error(problem, refined) <= removal_error(problem, plain)
    chosen = {tuple(Obs(**option).choose([problem], 16 // width)) for option in options}
    assert len(chosen) == 2, "columns by one option, heads by the other"
