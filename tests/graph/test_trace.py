import copy

import pytest
import torch
from conftest import example, tiny_llama, token_ids, zero_consumers
from torch import nn

import prunekit
from prunekit.errors import TraceError
from prunekit.graph import operator_rule, trace

RATIOS = [8, 4, 2, 1]


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kv_heads", RATIOS)
def test_pruned_equals_masked(kv_heads, attention, tied):
    model = tiny_llama(kv_heads, attention, tied)
    graph = trace(model, example())
    units = graph["layers.0.self_attn"].num_units
    removed = {
        "layers.0.mlp": [0, 7, 39],
        "layers.2.mlp": list(range(1, 40)),
        "layers.0.self_attn": [units - 1],
    }
    removed["layers.2.self_attn"] = list(range(1, units))
    if "layers.1.self_attn.query_head" in graph.by_name:
        removed["layers.1.self_attn.query_head"] = [0]
    masked = copy.deepcopy(model)
    zero_consumers(masked, graph, removed)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    ids = token_ids(3, 11, seed=5)
    torch.testing.assert_close(logits(model, ids), logits(masked, ids), rtol=1e-4, atol=1e-4)
    dense = tiny_llama(kv_heads, attention, tied)
    assert (logits(dense, ids) - logits(model, ids)).abs().max() > 0.01, (
        "the cut must matter for the test to mean anything"
    )
    gone = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in model.parameters())
    assert gone == graph.removed_parameters(removed)


@pytest.mark.parametrize("kv_heads", RATIOS)
def test_heads_go_with_the_key_value_head_they_read(kv_heads):
    graph = trace(tiny_llama(kv_heads), example())
    group = graph["layers.1.self_attn"]
    assert group.kind == "attention"
    assert group.num_units == (kv_heads if kv_heads > 1 else 8)
    width = 48 // group.num_units
    members = {
        (m.parameter.split(".")[-2], m.dim, m.role): m.index
        for m in group.members
        if m.parameter.endswith("weight")
    }
    first = torch.arange(width).tolist()
    assert members["q_proj", 0, "producer"][0].tolist() == first
    assert members["o_proj", 1, "consumer"][0].tolist() == first
    assert (("k_proj", 0, "producer") in members) == (kv_heads > 1)
    assert {m.parameter for m in group.members if m.parameter.endswith("bias")} >= {
        "model.layers.1.self_attn.q_proj.bias"
    }


def test_eager_and_sdpa_give_the_same_groups():
    graphs = [trace(tiny_llama(4, attention), example()) for attention in ("eager", "sdpa")]
    assert graphs[0].fingerprint == graphs[1].fingerprint


def test_residual_channels_are_inexact_and_vocabulary_is_fixed():
    graph = trace(tiny_llama(tied=True), example())
    channel = next(group for group in graph.groups if group.kind == "channel")
    assert channel.num_units == 48
    assert channel.prunable
    assert not channel.exact
    assert "mean" in channel.reason
    vocabulary = next(group for group in graph.groups if group.num_units == 97)
    assert not vocabulary.prunable
    assert "vocabulary" in vocabulary.reason


def test_plain_module_without_layers():
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.GELU(), nn.Linear(12, 3))
    graph = trace(net, (torch.randn(4, 6),))
    assert [(g.num_units, g.prunable) for g in graph.groups if g.prunable] == [
        (20, True),
        (12, True),
    ]
    removed = {g.name: [0, 3] for g in graph.groups if g.prunable}
    masked = copy.deepcopy(net)
    zero_consumers(masked, graph, removed)
    prunekit.apply_plan(net, graph, prunekit.PruningPlan(removed))
    x = torch.randn(5, 6)
    torch.testing.assert_close(net(x), masked(x))
    assert (net[0].out_features, net[2].in_features, net[2].out_features) == (18, 18, 10)


def test_convolutions_with_batch_norm_and_residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.inner = nn.Conv2d(8, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.outer = nn.Conv2d(6, 8, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.outer(self.norm(self.inner(x)).relu())
            return self.head(x.mean((2, 3)))

    net = Block().eval()
    net.norm.running_mean.normal_()
    graph = trace(net, (torch.randn(2, 3, 5, 5),))
    inner = next(group for group in graph.groups if group.num_units == 6)
    assert {m.parameter for m in inner.members} >= {
        "inner.weight",
        "norm.running_var",
        "outer.weight",
    }
    masked = copy.deepcopy(net)
    zero_consumers(masked, graph, {inner.name: [1, 4]})
    prunekit.apply_plan(net, graph, prunekit.PruningPlan({inner.name: [1, 4]}))
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(net(x), masked(x))


def test_tracing_copies_and_changes_nothing():
    model = tiny_llama()
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    trace(model, example())
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])


@torch.library.custom_op("prunekit_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 10), nn.Linear(10, 2)

    def forward(self, x):
        return self.second(twice(self.first(x)))


def test_operator_without_a_rule_is_an_error_that_says_how_to_add_one():
    with pytest.raises(
        TraceError, match="no rule for operator prunekit_test.twice.default"
    ) as caught:
        trace(Unknown(), (torch.randn(3, 4),))
    assert '@prunekit.graph.operator_rule("prunekit_test.twice.default")' in str(caught.value)
    assert "test_trace.py" in str(caught.value)
    from prunekit.graph import operators

    operator_rule("prunekit_test.twice.default")(lambda call: call.elementwise(*call.inputs()))
    try:
        graph = trace(Unknown(), (torch.randn(3, 4),))
    finally:
        del operators._RULES["prunekit_test.twice.default"]
    assert [g.num_units for g in graph.groups if g.prunable] == [10]


@pytest.mark.parametrize(
    ("inputs", "problem"), [(["input", "foo"], "'foo'; .*takes input$"), (["x"], "'input'; ")]
)
def test_keys_that_the_forward_pass_does_not_take(inputs, problem):
    with pytest.raises(TraceError, match=f"Sequential: inputs: .* argument:? {problem}"):
        trace(nn.Sequential(nn.Linear(4, 4)), {name: torch.ones(2, 4) for name in inputs})


def test_a_module_that_cannot_be_captured():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(TraceError, match="torch.export can't capture"):
        trace(Dynamic(), (torch.randn(2, 2),))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_single_head_leaves_no_attention_group(attention):
    model = tiny_llama(1, attention, heads=1)
    graph = trace(model, example())
    assert {group.kind for group in graph.groups if group.prunable} == {
        "mlp",
        "head_dim",
        "channel",
    }
    assert [group.num_units for group in graph.groups if group.kind == "mlp"] == [40, 40, 40]
    prunekit.prune(model, ratio=0.2, calibration=token_ids(4, 12))


def test_a_call_that_would_keep_a_cache_is_traced_without_one():
    graph = trace(
        tiny_llama(), {"input_ids": token_ids(), "attention_mask": torch.ones_like(token_ids())}
    )
    assert graph.fingerprint == trace(tiny_llama(), example()).fingerprint


def test_a_kernels_extent_is_no_unit():
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 9, 3),
        nn.Flatten(),
        nn.Linear(81, 2),
    )
    x = torch.randn(4, 3, 7, 7)
    graph = trace(net, (x,))
    assert [group.num_units for group in graph.groups if group.prunable] == [12, 9]
    result = prunekit.prune(
        net, ratio=0.3, method="magnitude", calibration=[{"input": x}], overrides=["policy=uniform"]
    )
    assert net(x).shape == (4, 2)
    assert result.report["ratio"]["achieved"] == pytest.approx(0.3, abs=0.1)


def test_networkx_view():
    graph = trace(tiny_llama(), example()).to_networkx()
    assert graph.has_edge("layers.0.mlp", "model.layers.0.mlp.down_proj.weight[1]")
    assert (
        graph.edges["layers.0.mlp", "model.layers.0.mlp.down_proj.weight[1]"]["role"] == "consumer"
    )


def test_layers_that_are_run_from_a_part_of_their_list_are_known_by_their_places():
    """Where modules are shared, torch.export names such a layer `slice(None, 3, None).0`."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
    graph = prunekit.trace(model, example())
    paths = {extent.module for extent in graph.extents}
    assert "model.layers.2.self_attn" in paths <= dict(model.named_modules()).keys()
