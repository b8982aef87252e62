import pytest
import torch
from conftest import example, randomise, tiny_llama, token_ids
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from prunekit.errors import ConfigError
from prunekit.graph import trace
from prunekit.importance import LoraGradient, Magnitude
from prunekit.importance.lora import _draw_directions


def tiny_conv1d():
    config = GPT2Config(vocab_size=53, n_positions=32, n_embd=24, n_layer=2, n_head=4)
    return randomise(GPT2LMHeadModel(config))


def batches(ids, size=2):
    return [{"input_ids": chunk, "use_cache": False} for chunk in ids.split(size)]


def estimates(model, graph, group, ids, rank, seed=0):
    """What the importance takes for ∂L/∂W, read off where it is made."""
    from prunekit.importance import lora

    found = {}
    importance = LoraGradient(rank=rank, seed=seed)
    original = lora._accumulate

    def watched(model, adapters, *rest):
        original(model, adapters, *rest)
        found.update({name: adapter.estimate() for name, adapter in adapters.items()})

    lora._accumulate = watched
    try:
        importance.score(model, graph, [group], batches(ids))
    finally:
        lora._accumulate = original
    return found


def gradients(model, names, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return torch.autograd.grad(loss, [model.get_parameter(name) for name in names])


@pytest.mark.parametrize("make", [tiny_llama, tiny_conv1d])
def test_with_full_rank_the_gradient_is_exact(make):
    model = make().double()
    graph = trace(model, example())
    ids = token_ids(4, 7, vocabulary=53)
    for group in [g for g in graph.groups if g.kind in ("attention", "mlp")]:
        found = estimates(model, graph, group, ids, rank=10_000)
        assert found.keys() == {
            m.parameter for m in group.members if m.parameter.endswith("weight")
        }
        for estimate, exact in zip(found.values(), gradients(model, found, ids), strict=True):
            torch.testing.assert_close(estimate, exact, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("make", [tiny_llama, tiny_conv1d])
def test_the_estimate_is_unbiased(make):
    """The mean of 200 estimates: its error falls as 1/√200 of a single one's."""
    model = make().double()
    graph = trace(model, example())
    group = next(g for g in graph.groups if g.kind == "mlp")
    ids = token_ids(2, 6, vocabulary=53)
    runs = [estimates(model, graph, group, ids, rank=4, seed=seed) for seed in range(200)]
    for name, exact in zip(runs[0], gradients(model, runs[0], ids), strict=True):
        errors = torch.stack([run[name] - exact for run in runs])
        single = errors.flatten(1).norm(dim=1).mean()
        assert single > exact.norm()  # rank 4 of 24 or more: one estimate says little
        assert errors.mean(0).norm() < 1.3 * single / 200**0.5


def test_directions_are_orthogonal_and_seeded():
    a = _draw_directions("x", 0, 8, 40)
    torch.testing.assert_close(a @ a.T, 5 * torch.eye(8, dtype=torch.float64))
    assert torch.equal(a, _draw_directions("x", 0, 8, 40))
    assert not torch.equal(a, _draw_directions("x", 1, 8, 40))
    assert not torch.equal(a, _draw_directions("y", 0, 8, 40))


@pytest.mark.parametrize("p", [1, 2])
def test_scores_by_hand(p):
    model = tiny_llama(layers=1).double()
    graph = trace(model, example())
    group, ids = graph["layers.0.mlp"], token_ids(4, 7)
    scores = LoraGradient(rank=10_000, p=p).score(model, graph, [group], batches(ids))[group.name]
    expected = torch.zeros(group.num_units, dtype=torch.float64)
    weights = [m for m in group.members if m.parameter.endswith("weight")]
    for member, g in zip(
        weights, gradients(model, [m.parameter for m in weights], ids), strict=True
    ):
        expected += (
            (g * model.get_parameter(member.parameter)).abs().pow(p).sum(1 - member.dim).detach()
        )
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-12)


def test_a_weight_shared_by_two_linears_sums_their_gradients():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
            self.b.weight = self.a.weight

        def forward(self, x):
            return {"loss": self.out(self.b(self.a(x).tanh()).tanh()).square().mean()}

    net, x = Net().double(), torch.randn(5, 6, dtype=torch.float64)
    graph = trace(net, {"x": x})
    group = next(g for g in graph.groups if any(m.parameter == "a.weight" for m in g.members))
    scores = LoraGradient(rank=6).score(net, graph, [group], [{"x": x}])[group.name]
    names = {m.parameter: None for m in group.members if m.parameter.endswith("weight")}
    exact = dict(
        zip(
            names,
            torch.autograd.grad(net(x)["loss"], [net.get_parameter(n) for n in names]),
            strict=True,
        )
    )
    expected = torch.zeros(group.num_units, dtype=torch.float64)
    for member in (m for m in group.members if m.parameter in exact):
        elements = (exact[member.parameter] * net.get_parameter(member.parameter).detach()).abs()
        expected += elements.sum(1 - member.dim)[member.index].sum(1)
    torch.testing.assert_close(scores, expected)


def test_a_group_without_linear_weights_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = trace(net, (torch.randn(1, 3, 5, 5),))
    group = next(g for g in graph.groups if g.prunable)
    with pytest.raises(
        ConfigError, match=r"lora_gradient scores linear modules' weights, and it has none$"
    ):
        LoraGradient().score(net, graph, [group], [{"input": torch.randn(1, 3, 5, 5)}])


@pytest.mark.parametrize(("key", "value"), [("rank", 0), ("p", 3)])
def test_numbers_out_of_range(key, value):
    with pytest.raises(ConfigError, match=f"importance.{key}: expected .*, got {value}"):
        LoraGradient(**{key: value})


def test_it_does_not_hold_gradients_of_the_weights_size():
    """No tensor as large as a matrix lives while the backward pass runs, but the activations and
    the weights.
    """
    model = tiny_llama(layers=1)
    graph = trace(model, example())
    seen = []
    original = torch.autograd.backward

    def watched(*args, **kwargs):
        seen.append([p.requires_grad for p in model.parameters()])
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "backward", watched)
        LoraGradient().score(model, graph, [graph["layers.0.mlp"]], batches(token_ids()))
    assert seen and not any(map(any, seen))
    assert Magnitude().score(model, graph, [graph["layers.0.mlp"]], [])
