"""Importances from activations and whole layers, against plain loops in float64."""

import pytest
import torch
from conftest import example, inputs_of, tiny_llama, token_ids
from torch import nn

from prunekit.allocation.costs.weights import weights_cost
from prunekit.calibration.activations import gather_input_statistics
from prunekit.calibration.gradients.loss import calibration_loss
from prunekit.errors import ConfigError
from prunekit.graph import trace
from prunekit.importance import Ablation, Alternate, Fluctuation, Magnitude, Similarity, Wanda
from prunekit.policies import Owl, Setting, Uniform

IDS = token_ids(6, 9)
BATCHES = [{"input_ids": IDS[:4], "use_cache": False}, {"input_ids": IDS[4:], "use_cache": False}]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_wanda_by_a_plain_loop(kv_heads):
    model = tiny_llama(kv_heads, layers=2)
    graph = trace(model, example())
    for name, modules in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        group = graph[f"layers.1.{name}"]
        scores = Wanda(aggregation="sum").score(model, graph, [group], BATCHES)[group.name]
        expected = torch.zeros(group.num_units, dtype=torch.float64)
        for short in modules:
            path = f"model.layers.1.{name}.{short}_proj"
            element = model.get_submodule(path).weight.detach().double().abs() * inputs_of(
                model, path, IDS
            ).norm(dim=0)
            member = next(m for m in group.members if m.parameter == f"{path}.weight")
            for unit, positions in enumerate(member.index):
                expected[unit] += element.index_select(member.dim, positions).sum()
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_fluctuation_by_a_plain_loop():
    model = tiny_llama(layers=2)
    graph = trace(model, example())
    group = graph["layers.1.self_attn"]
    x = inputs_of(model, "model.layers.1.self_attn.o_proj", IDS)
    weight = model.model.layers[1].self_attn.o_proj.weight.detach().double()
    columns = x.var(0, unbiased=False) * weight.square().sum(0)
    expected = columns[group.consumers[0].index].sum(1)
    torch.testing.assert_close(
        Fluctuation(normalisation="none").score(model, graph, [group], BATCHES)[group.name],
        expected,
        rtol=1e-4,
        atol=1e-8,
    )


@pytest.mark.parametrize("backend", [Wanda(), Fluctuation()])
def test_padding_does_not_count(backend):
    model = tiny_llama(layers=2)
    graph = trace(model, example())
    groups = [graph["layers.1.mlp"], graph["layers.0.self_attn"]]
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[:, 5:] = 0
    short = backend.score(model, graph, groups, [{"input_ids": IDS[:1, :5]}])
    padded = backend.score(model, graph, groups, [{"input_ids": IDS[:1], "attention_mask": mask}])
    for group in groups:
        torch.testing.assert_close(padded[group.name], short[group.name], rtol=1e-4, atol=1e-8)


def test_the_model_is_left_in_its_mode():
    model = tiny_llama(layers=2).train()
    gather_input_statistics(model, ["model.layers.0.mlp.up_proj.weight"], BATCHES)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_similarity_by_a_plain_loop_and_the_loss_without_a_layer():
    model = tiny_llama(layers=4)
    graph = trace(model, example())
    with torch.no_grad():
        hidden = []
        handles = [
            layer.register_forward_hook(lambda _, args, output: hidden.append((args[0], output)))
            for layer in model.model.layers
        ]
        model(IDS, use_cache=False)
        for handle in handles:
            handle.remove()
    expected = torch.stack(
        [1 - nn.functional.cosine_similarity(a, b, dim=-1).double().mean() for a, b in hidden]
    )
    scores = Similarity().score(model, graph, graph.stacks, BATCHES)["layers"]
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)

    losses = Ablation().score(model, graph, graph.stacks, BATCHES)["layers"]
    for layer in range(4):
        shorter = tiny_llama(layers=4)
        del shorter.model.layers[layer]
        for i, left in enumerate(shorter.model.layers):
            left.self_attn.layer_idx = i
        shorter.config.num_hidden_layers = 3
        with torch.no_grad():
            rise = calibration_loss(shorter.eval(), BATCHES) - calibration_loss(model, BATCHES)
        assert losses[layer].item() == pytest.approx(rise, abs=1e-5)


def test_every_other_layer_spread_evenly():
    model = tiny_llama(layers=8)
    graph = trace(model, example())
    order = Alternate().score(model, graph, graph.stacks, [])["layers"].argsort().tolist()
    assert sorted(order[:4]) == [1, 3, 5, 7]
    assert sorted(order[:2]) == [1, 5]


def test_a_layer_scores_what_its_parameters_score():
    model = tiny_llama(layers=3)
    graph = trace(model, example())
    expected = [
        sum(p.detach().double().square().sum() for p in layer.parameters())
        for layer in model.model.layers
    ]
    scores = Magnitude().score(model, graph, graph.stacks, [])["layers"]
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_outliers_keep_more():
    """A layer with a few huge weights loses less than the others; the shares stay around one."""
    model = tiny_llama(layers=4)
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight.view(-1)[::50] *= 40
    graph = trace(model, example())
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    cost = weights_cost(graph)
    setting = Setting(
        model=model,
        graph=graph,
        groups=groups,
        batches=BATCHES,
        importance=Magnitude(),
        cost=cost,
        limit=cost({}) / 2,
    )
    shares = Owl(multiple=15, spread=0.4).group_shares(setting)
    assert shares["layers.2.mlp"] == shares["layers.2.self_attn"] == pytest.approx(0.6)
    assert max(shares.values()) == pytest.approx(1.4)
    assert setting.notes["outliers"]["layer 2"] == max(setting.notes["outliers"].values())
    assert set(Uniform().group_shares(setting).values()) == {1.0}


def test_what_cannot_be_scored():
    model = tiny_llama(layers=2)
    graph = trace(model, example())
    rotary = next(g for g in graph.groups if g.kind == "head_dim" and g.layer is None)
    with pytest.raises(ConfigError, match="fluctuation scores what linear modules read"):
        Fluctuation().score(model, graph, [rotary], BATCHES)
    with pytest.raises(ConfigError, match="scores whole layers"):
        Similarity().score(model, graph, [graph["layers.0.mlp"]], BATCHES)
