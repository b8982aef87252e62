import pytest
import torch
from conftest import example, inputs_of, tiny_llama, token_ids

from prunekit.errors import ConfigError
from prunekit.graph import trace
from prunekit.importance import Fluctuation, Magnitude, Mixed, Obs, PeakToPeak, Random
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


def test_peak_to_peak_by_hand():
    model = tiny_llama(kv_heads=2)
    graph, ids = trace(model, example()), token_ids()
    ffn, heads = graph["layers.1.mlp"], graph["layers.1.self_attn"]
    batches = [{"input_ids": ids, "use_cache": False}]
    scores = PeakToPeak().score(model, graph, [ffn, heads], batches)
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    x = inputs_of(model, "model.layers.1.mlp.down_proj", ids)
    for unit in range(40):
        rows = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)
        ranges = [weight.amax(1) - weight.amin(1) for weight in rows]
        expected = sum(own[unit] / own.max() for own in ranges) * x[:, unit].norm()
        assert scores[ffn.name][unit].item() == pytest.approx(expected.item(), rel=1e-5)
    x = inputs_of(model, "model.layers.1.self_attn.o_proj", ids)
    narrow, wide = (attention.k_proj, attention.v_proj), (attention.q_proj, attention.o_proj)
    slices = [(6, module.weight) for module in narrow]
    slices += [(24, wide[0].weight), (24, wide[1].weight.T)]
    expected = torch.zeros(2)
    for width, weight in slices:
        own = torch.stack([part.max() - part.min() for part in weight.split(width)])
        expected += own / own.max()
    expected *= torch.stack([part.norm() for part in x.split(24, 1)]).float()
    torch.testing.assert_close(scores[heads.name].float(), expected)


def test_mixed_is_the_weighted_mean_of_ranks_or_scores():
    model = tiny_llama()
    graph = trace(model, example())
    group, batches = graph["layers.0.mlp"], [{"input_ids": token_ids(), "use_cache": False}]
    parts = [Magnitude().score, Fluctuation().score]
    one, two = (score(model, graph, [group], batches)[group.name] for score in parts)
    mixed = {"parts": ["magnitude", "fluctuation"], "weights": [3, 1]}
    by_score = Mixed(by="score", **mixed).score(model, graph, [group], batches)[group.name]
    torch.testing.assert_close(by_score, 0.75 * one / one.mean() + 0.25 * two / two.mean())
    by_rank = Mixed(**mixed).score(model, graph, [group], batches)[group.name]
    places = [[sum(own < mine) / 40 for mine in own] for own in (one, two)]
    expected = 0.75 * torch.stack(places[0]) + 0.25 * torch.stack(places[1])
    torch.testing.assert_close(by_rank, expected.double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["obss", "wanda"]}, r"importance.parts: unknown 'obss': did you mean obs\?"),
        ({"parts": "obs"}, "importance.parts: expected a list of names, got 'obs'"),
        ({"parts": ["mixed", "obs"]}, "importance.parts: unknown 'mixed'"),
        ({"weights": [1]}, r"expected 2 numbers ≥ 0, one for each of .*, got \[1\]"),
        ({"weights": [1, -1]}, "expected 2 numbers ≥ 0"),
        ({"weights": [0, 0]}, "expected one that is not 0"),
        ({"by": "order"}, "importance.by: unknown 'order'"),
    ],
)
def test_mixtures_that_are_none_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Mixed(**options)
