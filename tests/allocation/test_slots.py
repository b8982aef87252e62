"""Slots: which numbers of units may stay, by the widths asked for and those a class holds."""

import pytest
from conftest import example
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import prunekit
from prunekit.allocation.limits import find_demands
from prunekit.allocation.scope import Scope
from prunekit.allocation.slots import make_slots
from prunekit.config import RunConfig

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}


def narrow_llama(**sizes):
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes))


def possible_counts(model, kind, shapes="aligned", **options):
    """Group of a kind → how many of its units may stay, if not all."""
    graph = prunekit.trace(model, example())
    groups = [group for group in graph.groups if group.kind == kind and group.prunable]
    scope = Scope(**options)
    demands = find_demands(model, graph, groups, RunConfig(shapes=shapes), scope)
    shares = {group.name: 1.0 for group in groups}
    return {
        group: {group.num_units - slot.factors[group.name] * gone for gone in slot.removed[1:]}
        for slot in make_slots(scope, groups, shares, demands)
        for group in slot.groups
    }


def test_the_width_of_heads_is_aligned_and_pairs_count_twice():
    model = narrow_llama(num_attention_heads=2, num_key_value_heads=2, head_dim=128)
    counts = possible_counts(model, "head_dim")
    expected = set(range(8, 128, 8))
    assert {group.num_units for group in counts} == {64, 128}
    for group, kept in counts.items():
        assert {count * 128 // group.num_units for count in kept} == expected
    for group, kept in possible_counts(model, "head_dim", width_multiple=32).items():
        assert {count * 128 // group.num_units for count in kept} == {32, 64, 96}


def test_stacked_experts_keep_aligned_widths_and_any_number_of_themselves():
    sizes = SIZES | {"intermediate_size": 256, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    assert all(kept == set(range(16, 256, 16)) for kept in possible_counts(model, "mlp").values())
    free = possible_counts(model, "mlp", "free")
    assert all(kept == set(range(8, 256, 8)) for kept in free.values())
    assert all(kept == {2, 3} for kept in possible_counts(model, "expert").values())


@pytest.mark.parametrize(("shapes", "step"), [("aligned", 32), ("uniform", 8), ("free", 1)])
def test_a_step_of_all_layers_at_once_is_finer(shapes, step):
    (kept,) = possible_counts(narrow_llama(intermediate_size=640), "mlp", shapes).values()
    assert kept == set(range(step, 640, step))


@pytest.mark.parametrize(("hidden", "heads", "step"), [(448, 28, 28), (384, 24, 24), (512, 8, 32)])
def test_a_step_is_halved_where_too_few_uniform_widths_would_be_left(hidden, heads, step):
    """The class wants heads to divide the width: 28 and 16 together would leave every 112th."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 4}
    (kept,) = possible_counts(
        narrow_llama(hidden_size=hidden, **sizes), "channel", "uniform"
    ).values()
    assert kept == set(range(step, hidden, step))


def test_a_minimum_that_leaves_no_aligned_width_is_met_by_a_smaller_step():
    model = narrow_llama(intermediate_size=256)
    (kept,) = possible_counts(model, "mlp", min_units=250).values()
    assert kept == {252}
