import pytest
import torch
from conftest import example, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunekit.errors import ConfigError
from prunekit.graph import trace
from prunekit.policies import (
    LinearDecrease,
    LinearIncrease,
    LogDecrease,
    LogIncrease,
    Manual,
    Uniform,
    Window,
    allocate,
)

POLICIES = [Uniform(), Window(), LogIncrease(), LogDecrease(), LinearIncrease(), LinearDecrease()]
GRAPH = trace(tiny_llama(kv_heads=4, layers=5), example())
BLOCK = [group for group in GRAPH.groups if group.kind in ("attention", "mlp")]
CHEAPEST = min(group.parameters_per_unit for group in BLOCK)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(POLICIES), st.floats(0.005, 0.95))
def test_every_policy_hits_its_target_within_half_a_unit(policy, ratio):
    target = ratio * GRAPH.num_parameters()
    try:
        counts = allocate(GRAPH, BLOCK, policy, ratio)
    except ConfigError as error:
        reach = float(str(error).split("at most ")[1].split(" ")[0])
        assert ratio > reach
        return
    removed = GRAPH.removed_parameters({name: list(range(count)) for name, count in counts.items()})
    assert abs(removed - target) <= CHEAPEST / 2 + 1e-6
    assert all(0 <= counts[g.name] < g.num_units for g in BLOCK)


@pytest.mark.parametrize("ratio", [0, 1, -0.2, 1.2, float("nan")])
def test_ratio_outside_its_range(ratio):
    with pytest.raises(ConfigError, match=r"ratio: expected a number in \(0, 1\)"):
        allocate(GRAPH, BLOCK, Uniform(), ratio)


def test_out_of_reach_names_the_most_that_can_go():
    with pytest.raises(ConfigError, match="at most 0.4") as caught:
        allocate(GRAPH, BLOCK, Window(), 0.9)
    reach = float(str(caught.value).split("at most ")[1].split(" ")[0])
    allocate(GRAPH, BLOCK, Window(), reach)


def test_counts_follow_the_shape():
    counts = allocate(GRAPH, BLOCK, LogIncrease(), 0.3)
    mlp = [counts[f"layers.{i}.mlp"] for i in range(5)]
    assert mlp == sorted(mlp)
    assert mlp[0] < mlp[-1] / 2
    window = allocate(GRAPH, BLOCK, Window(), 0.2)
    assert window["layers.0.mlp"] == window["layers.4.mlp"] == window["layers.0.self_attn"] == 0


def test_matrices_cut_on_both_sides_are_counted_once():
    net = nn.Sequential(nn.Linear(8, 50), nn.ReLU(), nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 2))
    graph = trace(net, (torch.randn(3, 8),))
    groups = [group for group in graph.groups if group.prunable]
    counts = allocate(graph, groups, Uniform(), 0.5)
    removed = graph.removed_parameters({name: list(range(count)) for name, count in counts.items()})
    assert abs(removed / graph.num_parameters() - 0.5) < 0.01


def test_shapes_are_those_of_the_papers():
    log = LogIncrease().shares(32)
    assert log[0] == 0.25
    assert log[31] == 1
    scale = 0.25  # SlimGPT's command: r_0 = 0.0625, r_31 = 0.25, the mean is 0.2004
    assert sum(log) / 32 * scale == pytest.approx(0.2004, abs=5e-5)
    window = Window().shares(32)
    assert [i for i, share in enumerate(window) if share] == list(range(4, 30))
    assert Window().shares(8) == [0, 1, 1, 1, 1, 1, 1, 0]
    assert LogDecrease().shares(7) == pytest.approx(LogIncrease().shares(7)[::-1])
    assert LinearIncrease().shares(4) == pytest.approx([0.25, 0.5, 0.75, 1])
    assert LinearIncrease().shares(1) == [1]


def test_manual_shares():
    assert Manual(values=[1, 2, 0]).shares(3) == [1, 2, 0]
    with pytest.raises(ConfigError, match="expected 4 numbers, one a layer, got 3"):
        Manual(values=[1, 2, 0]).shares(4)
    with pytest.raises(ConfigError, match="≥ 0"):
        Manual(values=[1, -2]).shares(2)


def test_window_of_a_model_too_shallow():
    with pytest.raises(ConfigError, match="use uniform"):
        Window().shares(2)
