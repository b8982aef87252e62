"""Costs against what is counted on models that were cut; tables of seconds by their shape."""

import copy
import random

import pytest
import torch
from conftest import randomise, tiny_llama, token_ids
from families import alternate, build, values_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prunekit
from prunekit.allocation.costs.bytes import Bytes
from prunekit.allocation.costs.curves import Curve, fit_isotonic, spread_widths
from prunekit.allocation.costs.flops import Flops, flops_cost
from prunekit.allocation.costs.latency import Latency, Stopwatch, latency_cost
from prunekit.allocation.costs.parameters import Parameters
from prunekit.allocation.costs.timing import fill_skeleton, median_seconds, record_calls
from prunekit.allocation.costs.weights import weights_cost
from prunekit.allocation.objective import select_cost
from prunekit.config import TargetConfig
from prunekit.errors import ConfigError, TraceError
from prunekit.graph.capture import meta_copy

FAMILIES = (
    "llama",
    "gpt2",
    "opt",
    "gpt_neox",
    "phi3",
    "falcon",
    "cohere",
    "bloom",
    "mixtral",
    "qwen2_moe",
)


class Convolutions(nn.Module):
    """Grouped, depthwise and transposed ones among plain ones, and a recurrent cell."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        x = self.depthwise(self.norm(self.stem(x)).relu()).relu()
        return self.head(self.up(self.grouped(x).relu()).relu().mean((2, 3)))


class Stack(nn.Module):
    """Two wide feed-forward layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64)) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def counted(model, inputs):
    """What torch counts, every product spelled out: two for attention, experts one by one."""
    model = copy.deepcopy(model)
    if hasattr(model, "config"):
        model.config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    return counter.get_total_flops()


def drawn(graph, seed, kinds=None):
    """Some units of each group, differently many; of experts, whose rows must be 16 bytes long, two
    stay to choose.
    """
    rng = random.Random(seed)
    step = 4 if any(group.kind == "expert" for group in graph.groups) else 1
    removed = {}
    for group in graph.groups:
        if group.prunable and (kinds is None or group.kind in kinds):
            most = group.num_units - (2 if group.kind == "expert" else 1)
            number = rng.randint(0, most)
            number -= number % step if group.kind in ("mlp", "channel") else 0
            removed[group.name] = rng.sample(range(group.num_units), number)
    return removed


def counts(removed):
    return {name: float(len(units)) for name, units in removed.items()}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("family", "attention"), alternate(FAMILIES))
def test_flops_and_parameters_equal_the_cut_models(family, attention):
    model = build(family, values_of(family), attention)
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    inputs = {"input_ids": token_ids(3, 9), "use_cache": False}
    flops, weights = flops_cost(model, graph, inputs), weights_cost(graph)
    assert flops({}) == counted(model, inputs)
    for seed in range(2):
        removed = drawn(graph, seed, ("attention", "query_head", "mlp", "expert", "channel"))
        pruned = copy.deepcopy(model)
        prunekit.apply_plan(pruned, graph, prunekit.PruningPlan(removed))
        assert flops(counts(removed)) == counted(pruned, inputs)
        assert weights(counts(removed)) == parameters(pruned)


@pytest.mark.parametrize("rows", [1, 2])
def test_narrower_heads_and_single_rows_are_counted(rows):
    model = tiny_llama(kv_heads=2, layers=2)
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    inputs = {"input_ids": token_ids(rows, 16), "use_cache": False}
    flops = flops_cost(model, graph, inputs)
    removed = {
        "layers.0.self_attn": [1],
        "layers.0.self_attn.query_head": [0, 3],
        "layers.1.mlp": [3, 4, 5],
    }
    pairs = [g for g in graph.groups if g.kind == "head_dim" and g.prunable and g.layer is None]
    removed |= {group.name: [1] for group in pairs}
    removed |= {
        g.name: [1, 4]
        for g in graph.groups
        if g.kind == "head_dim" and g.layer is not None and g.exact
    }
    pruned = copy.deepcopy(model)
    prunekit.apply_plan(pruned, graph, prunekit.PruningPlan(removed))
    assert pairs
    assert flops(counts(removed)) == counted(pruned, inputs)


@pytest.mark.parametrize("seed", range(4))
def test_convolutions(seed):
    model = randomise(Convolutions())
    graph = prunekit.trace(model, {"x": torch.randn(2, 3, 8, 8)})
    inputs = {"x": torch.randn(3, 3, 12, 12)}
    removed = drawn(graph, seed)
    flops, weights = flops_cost(model, graph, inputs), weights_cost(graph)
    assert flops({}) == counted(model, inputs)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    assert flops(counts(removed)) == counted(model, inputs)
    assert weights(counts(removed)) == parameters(model)


def test_tied_embeddings_are_one_parameter_and_one_product():
    model = tiny_llama(tied=True, layers=2)
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    inputs = {"input_ids": token_ids(2, 8), "use_cache": False}
    assert flops_cost(model, graph, inputs)({}) == counted(model, inputs)
    assert weights_cost(graph)({}) == parameters(model)


def test_recurrent_cells_are_a_constant():
    model = nn.LSTM(6, 4, batch_first=True)
    inputs = {"input": torch.randn(2, 5, 6)}
    flops = flops_cost(model, prunekit.trace(model, inputs), inputs)
    assert flops({}) == 2 * 2 * 5 * (16 * 6 + 16 * 4)
    assert not any(term.cuts for term in flops.terms)


def test_an_example_that_changes_the_groups_is_refused():
    model = tiny_llama(layers=2)
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    with pytest.raises(TraceError, match="other groups"):
        flops_cost(tiny_llama(layers=1), graph, {"input_ids": token_ids(2, 7), "use_cache": False})


GROUPED = tiny_llama(kv_heads=2, layers=2)
GRAPH = prunekit.trace(GROUPED, {"input_ids": token_ids(2, 7)})
PRUNABLE = [group for group in GRAPH.groups if group.prunable]


@given(st.tuples(*(st.integers(0, group.num_units - 1) for group in PRUNABLE)), st.integers(0, 99))
def test_any_counts_of_overlapping_groups_leave_the_parameters_of_the_union(numbers, seed):
    rng = random.Random(seed)
    removed = {
        g.name: rng.sample(range(g.num_units), n) for g, n in zip(PRUNABLE, numbers, strict=True)
    }
    left = GRAPH.num_parameters() - GRAPH.removed_parameters(removed)
    assert weights_cost(GRAPH)(counts(removed)) == pytest.approx(left, abs=1e-6)


def test_weights_in_bytes():
    each = {name: 2.0 if "mlp" in name else 0.5 for name in GRAPH.shapes}
    expected = sum(each[name] * p.numel() for name, p in GROUPED.named_parameters())
    assert weights_cost(GRAPH, "bytes", each)({}) == expected


def state(model):
    settings = (
        {k: v for k, v in vars(model.config).items() if not k.startswith("_")}
        if hasattr(model, "config")
        else {}
    )
    modules = [
        (m, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), str(m.extra_repr()))
        for m in model.modules()
    ]
    return (
        copy.deepcopy(settings),
        modules,
        [*map(id, model.parameters())],
        copy.deepcopy(model.state_dict()),
    )


def assert_untouched(model, before):
    for old, new in zip(before[:3], state(model)[:3], strict=True):
        assert old == new
    assert all(torch.equal(tensor, before[3][name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral"])
def test_latency_of_decoders(family, monkeypatch):
    timed, seconds = [], Stopwatch.seconds
    monkeypatch.setattr(
        Stopwatch, "seconds", lambda *a: timed.append((a[1], seconds(*a))) or timed[-1][1]
    )
    model = build(family, values_of(family)).train()
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    groups = [
        g
        for g in graph.groups
        if g.prunable and g.kind in ("attention", "mlp", "query_head", "expert")
    ]
    before = state(model)
    cost = latency_cost(model, graph, groups, {"input_ids": token_ids(2, 16)}, widths=3, repeats=1)
    assert {place for place, _ in timed} <= {"", "model.layers.0", "transformer.h.0"}, (
        "equal layers are timed once"
    )
    assert [took is not None for place, took in timed if not place] == [True], (
        "the layers run alone"
    )
    assert_untouched(model, before)
    assert cost.name == "latency"
    assert {name: len(table) for name, table in cost.tables.items()} == {
        g.name: g.num_units + 1 for g in groups
    }
    for table in cost.tables.values():
        assert all(0 <= low <= high for low, high in zip(table, table[1:], strict=False))
    assert 0 < cost({g.name: g.num_units - 1 for g in groups}) <= cost({})
    same = [cost.tables[g.name] for g in groups if g.kind == "mlp"]
    assert same[1:] == same[:-1], "layers of equal shapes share one table"


def test_latency_without_layers_times_the_whole_model():
    model = randomise(Convolutions())
    example = {"x": torch.randn(2, 3, 8, 8)}
    graph = prunekit.trace(model, example)
    groups = [g for g in graph.groups if g.prunable]
    before = state(model)
    cost = latency_cost(model, graph, groups, example, widths=2, repeats=1)
    assert_untouched(model, before)
    assert cost.tables.keys() == {g.name for g in groups}


def test_latency_sees_what_is_slow():
    """Most of the time lies in a layer's feed-forward part, and half of that goes with half of its
    units.
    """
    model = Stack()
    example = (torch.randn(256, 64),)
    graph = prunekit.trace(model, example)
    groups = [g for g in graph.groups if g.kind == "mlp"]
    cost = latency_cost(model, graph, groups, example)
    assert [g.num_units for g in groups] == [4096, 4096]
    half = cost({g.name: 2048.0 for g in groups})
    assert 0.1 < half / cost({}) < 0.9


def test_a_layer_put_together_again_computes_the_same():
    model = tiny_llama(kv_heads=2, layers=2)
    calls = record_calls(
        model, {"model.layers.1"}, {"input_ids": token_ids(2, 7), "use_cache": False}
    )
    layer = model.model.layers[1]
    again = fill_skeleton(meta_copy(model).eval().model.layers[1], layer)
    with torch.no_grad():
        assert torch.equal(calls["model.layers.1"](again), calls["model.layers.1"](layer))
    assert not {id(p) for p in again.parameters()} & {id(p) for p in layer.parameters()}
    assert median_seconds(lambda: calls["model.layers.1"](again), torch.device("cpu"), 1) > 0


def test_curves():
    assert fit_isotonic([3.0, 1.0, 2.0, 5.0, 4.0]) == [2.0, 2.0, 2.0, 4.5, 4.5]
    assert Curve([2, 4], [1.0, 3.0]).table() == [0.0, 0.0, 0.0, 1.0, 2.0]
    assert Curve([3], [5.0]).table() == [0.0, 0.0, 0.0, 0.0]
    assert spread_widths(8, 5) == [1, 2, 4, 6, 8]
    assert spread_widths(11008, 5) == [1, 2752, 5504, 8256, 11008]
    assert spread_widths(2, 5) == [1, 2]
    assert spread_widths(7, 1) == [1, 7]


@pytest.mark.parametrize(
    "cost",
    [Parameters(), Bytes(), Flops(tokens=8, batch=2), Latency(tokens=8, batch=2)],
    ids=lambda cost: cost.name,
)
def test_a_limit_in_a_measure_selects_its_cost_unless_another_was_chosen(cost):
    target = TargetConfig(**{cost.name: 5.0}, tokens=8, batch=2)
    assert select_cost(Parameters(), target) == cost
    other = Latency() if cost.name == "flops" else Flops()
    with pytest.raises(ConfigError, match=f"target.{cost.name}: expected cost={cost.name}"):
        select_cost(other, target)
