"""Which models share a trace in these tests: those of one structure, and no others."""

import copy

import pytest
import torch
from conftest import example, tiny_llama
from sharing import rehearse_once, trace_anew, trace_once

import prunekit
from prunekit.surgery import counting


def test_everyone_shares_but_the_tests_of_the_tracer():
    assert prunekit.trace is prunekit.graph.trace is counting.trace is trace_once
    assert trace_once(tiny_llama(), example()).fingerprint == (
        trace_anew(tiny_llama(), example()).fingerprint
    )


def test_models_of_one_structure_share_a_graph():
    graph = trace_once(tiny_llama(), example())
    assert trace_once(tiny_llama(seed=1), example()) is graph
    assert trace_once(tiny_llama().train(), example()) is graph


def test_what_was_rehearsed_well_is_not_rehearsed_again():
    """Not for other groups, nor where a fault was found, nor with a graph of one's own."""
    model, calls, results = tiny_llama(), [], []

    def rehearse(model, graph, groups, *, saved):
        calls.append(groups)
        return results.pop() if results else graph

    once, graph = rehearse_once(rehearse), trace_once(model, example())
    groups = list(graph.groups)
    results.append(changed := copy.copy(graph))
    assert once(model, graph, groups) is changed
    assert once(model, graph, groups) is graph
    assert once(tiny_llama(seed=1), graph, groups) is graph
    assert len(calls) == 2
    once(model, graph, groups[:1])
    once(model, graph, groups, saved=True)
    assert len(calls) == 4
    for _ in range(2):
        once(model, changed, groups)
    assert len(calls) == 6


def scaled(model):
    model.model.layers[1].self_attn.scaling = 0.5
    return model


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    return model


def shared_norms(model):
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    return model


def replaced(model):
    model.model.norm.forward = lambda hidden: hidden
    return model


def cut(model):
    prunekit.apply_plan(
        model, trace_once(model, example()), prunekit.PruningPlan({"layers.0.mlp": [1]})
    )
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: tiny_llama(layers=2),
        lambda model: tiny_llama(kv_heads=2),
        lambda model: tiny_llama(attention="eager"),
        lambda model: tiny_llama(tied=True),
        lambda model: tiny_llama(rms_norm_eps=0.1),
        lambda model: model.double(),
        lambda model: model.to("meta"),
        lambda model: model.requires_grad_(False),
        scaled,
        hooked,
        shared_norms,
        replaced,
        cut,
    ],
)
def test_another_structure_is_traced_anew(change):
    graph = trace_once(tiny_llama(), example())
    assert trace_once(change(tiny_llama()), example()) is not graph


def test_another_example_is_traced_anew():
    model, inputs = tiny_llama(), example()
    graph = trace_once(model, inputs)
    assert trace_once(model, inputs) is graph
    for other in (
        example(length=6),
        {"input_ids": inputs["input_ids"] + 1, "use_cache": False},
        inputs | {"attention_mask": torch.ones(2, 7)},
    ):
        assert trace_once(model, other) is not graph
