"""The order in which surgery makes attributes follow a cut."""

import copy

import pytest
import torch
from conftest import example, tiny_llama, token_ids, zero_units
from families import build, values_of
from torch import nn

from prunekit.errors import SurgeryError
from prunekit.graph import trace
from prunekit.plan import PruningPlan
from prunekit.surgery import apply_plan
from prunekit.surgery.attributes import (
    STRATEGIES,
    EqualValues,
    EqualValuesOfOneName,
    KnownNames,
    NotedSizes,
    attempts,
)


class Attention(nn.Module):
    """Attention with names of its own: `h` heads, and two other attributes that are equal to it."""

    def __init__(self, gain=lambda self: 1.0):
        super().__init__()
        self.h, self.idle, self.strength, self.gain = 4, 4, 4, gain
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.out, self.head = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (self.h, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.head(x + self.gain(self) * self.out(mixed.transpose(1, 2).flatten(2)))


@pytest.fixture
def tried(monkeypatch):
    """Names of the strategies that were asked for their finders, in order."""
    asked = []
    for strategy in STRATEGIES:
        own = type(strategy).finders

        def spy(self, guessed, own=own):
            asked.append(type(self).__name__)
            return own(self, guessed)

        monkeypatch.setattr(type(strategy), "finders", spy)
    return asked


def cut_heads(model):
    graph = trace(model, (torch.randn(2, 3, 12),))
    apply_plan(model, graph, PruningPlan({"attention": [0, 2]}))
    return model.h, model.idle, model.strength


def test_the_order_of_the_strategies():
    kinds = [type(strategy) for strategy in STRATEGIES]
    assert kinds == [KnownNames, NotedSizes, EqualValues, EqualValuesOfOneName]
    assert [strategy.certain for strategy in STRATEGIES] == [True, True, False, False]
    guessed = []
    order = attempts(guessed)
    certain = next(order).finders
    assert len(certain) == 2
    everything = next(order).finders
    assert everything[:2] == certain
    guessed += ["b", "a", "b"]  # as the attempt before did
    names = [attempt.finders[-1].keywords for attempt in order]
    assert names == [{"only": "a"}, {"only": "b"}]


def test_no_guess_is_made_where_the_names_are_known(tried):
    model = tiny_llama()
    apply_plan(model, trace(model, example()), PruningPlan({"layers.1.self_attn": [0]}))
    assert tried == ["KnownNames", "NotedSizes"]


def test_guesses_that_are_not_needed_are_taken_back(tried):
    torch.manual_seed(0)
    assert cut_heads(Attention()) == (2, 4, 4)
    assert tried == ["KnownNames", "NotedSizes", "EqualValues"]


def test_names_are_tried_one_by_one_where_all_equal_values_are_too_many(tried):
    torch.manual_seed(0)
    model = Attention(gain=lambda self: self.strength / 4)
    assert cut_heads(model) == (2, 4, 4)
    assert tried == ["KnownNames", "NotedSizes", "EqualValues", "EqualValuesOfOneName"]


class Split(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.num_heads, self.proj = heads, nn.Linear(12, heads * 4)

    def forward(self, x):
        return self.proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Grouped(nn.Module):
    """Eight query heads on four keys and values, all of them counted under one name."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.taps, self.q = 8, 4, nn.Linear(12, 32)
        self.k, self.v, self.out = Split(4), Split(4), nn.Linear(32, 5)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        keys, values = (part(x).repeat_interleave(2, 1) for part in (self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, keys, values, scale=self.taps / 8)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_what_has_followed_is_no_old_size_for_a_guess(tried):
    """Half of the query heads are as many as all keys were."""
    torch.manual_seed(0)
    model = Grouped()
    graph = trace(model, (torch.randn(2, 3, 12),))
    (group,) = (group for group in graph.groups if group.kind == "attention")
    apply_plan(model, graph, PruningPlan({group.name: [0, 2]}))
    assert (model.num_heads, model.k.num_heads, model.v.num_heads, model.taps) == (4, 2, 2, 4)
    assert tried[-1] == "EqualValuesOfOneName"


def test_everything_is_put_back_where_no_strategy_helps(tried):
    torch.manual_seed(0)
    model = Attention(gain=lambda self: self.q.out_features)
    with pytest.raises(SurgeryError, match=r"^attention: .*differ"):
        cut_heads(model)
    assert (model.h, model.idle, model.strength, model.q.out_features) == (4, 4, 4, 16)
    assert tried[:4] == ["KnownNames", "NotedSizes", "EqualValues", "EqualValuesOfOneName"]


def test_one_word_for_two_equal_widths_keeps_its_meaning():
    model = build("mixtral", values_of("mixtral") | {"intermediate_size": 48})
    routers = [layer.mlp.gate for layer in model.model.layers]
    assert model.config.hidden_size == routers[0].hidden_dim == 48
    graph = trace(model, {"input_ids": token_ids(2, 7)})
    removed = {"layers.0.mlp.experts": range(3, 11), "layers.1.mlp.experts": range(16)}
    masked = zero_units(copy.deepcopy(model), graph, removed)
    apply_plan(model, graph, PruningPlan(removed))
    assert {router.hidden_dim for router in routers} == {48}
    ids = token_ids(3, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, masked(ids).logits, rtol=1e-3, atol=1e-3)


class Scale(nn.Module):
    """Numbers for each of `group_size` channels, of which its input may have several times as
    many.
    """

    def __init__(self, size):
        super().__init__()
        self.group_size, self.weight = size, nn.Parameter(torch.randn(size))

    def forward(self, x):
        return (x.unflatten(-1, (-1, self.group_size)) * self.weight).flatten(-2)


class Scaled(nn.Module):
    """Attention as wide as the stream of two parts beside it; both are scaled."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.stream, self.mixed = 4, Scale(16), Scale(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        x = self.stream(torch.cat([x, x], -1)).unflatten(-1, (2, 16)).sum(-2)
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return x + self.out(self.mixed(mixed.transpose(1, 2).flatten(2)))


def test_a_width_follows_where_the_heads_are_scaled_and_not_beside(tried):
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(2, 3, 16)
    graph = trace(model, (x,))
    masked = zero_units(copy.deepcopy(model), graph, {"attention": [0, 2]})
    apply_plan(model, graph, PruningPlan({"attention": [0, 2]}))
    assert (model.stream.group_size, model.mixed.group_size) == (16, 8)
    assert "EqualValues" not in tried  # no guess
    torch.testing.assert_close(model(x), masked(x))
