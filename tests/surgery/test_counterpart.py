"""Cuts that can't be masked are held against the model's class, built with the smaller number."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, tiny_llama, token_ids
from families import EXPERTS, build
from transformers import ModernBertConfig, ModernBertForSequenceClassification

import prunekit
from prunekit.errors import SurgeryError
from prunekit.graph import CouplingGraph
from prunekit.surgery.counterpart import compare_with_class


def without_member(graph: CouplingGraph, kind, parameter) -> CouplingGraph:
    """The graph as a tracer would see it that misses a member of the groups of a kind."""
    groups = tuple(
        replace(g, members=tuple(m for m in g.members if not m.parameter.endswith(parameter)))
        if g.kind == kind
        else g
        for g in graph.groups
    )
    return replace(graph, groups=groups)


@pytest.mark.parametrize(
    ("make", "kind", "missed"),
    [
        (lambda: build("qwen3_moe", EXPERTS["qwen3_moe"]), "expert", "experts.down_proj"),
        (lambda: tiny_llama(layers=2), "channel", "input_layernorm.weight"),
    ],
)
def test_a_tensor_that_the_tracer_missed_is_found(make, kind, missed):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    units = list(range(6)) if kind == "channel" else [0]
    removed = {g.name: units for g in graph.groups if g.kind == kind}
    with pytest.raises(SurgeryError, match=rf"{missed} smaller with it"):
        prunekit.apply_plan(
            model, without_member(graph, kind, missed), prunekit.PruningPlan(removed)
        )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))


def test_a_mixture_computes_what_its_class_does_with_fewer_experts():
    model = build("qwen3_moe", EXPERTS["qwen3_moe"])
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    removed = {g.name: [1] for g in graph.groups if g.kind == "expert"}
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    assert compare_with_class(model, graph, removed) is None
    model.model.layers[1].mlp.gate.top_k = 1  # an attribute that does not say what the config says
    assert "computes other outputs" in compare_with_class(model, graph, removed).text


def test_the_head_of_a_classifier_is_cut_with_its_norm():
    """ModernBERT's, which no masked model equals: its norm is over the units that stay."""
    config = ModernBertConfig(
        **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")},
        vocab_size=97,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=6,
    )
    model = randomise(ModernBertForSequenceClassification(config)).eval()
    ids = token_ids(3, 9)
    with torch.no_grad():
        first, before = model.model(ids).last_hidden_state[:, 0], copy.deepcopy(model)
    graph = prunekit.trace(model, {"input_ids": ids})
    (group,) = (g for g in graph.groups if g.kind == "mlp" and g.layer is None)
    assert not group.exact and "head.norm normalises over it" in group.reason
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({group.name: [0, 7, 30]}))
    kept = [unit for unit in range(48) if unit not in (0, 7, 30)]
    dense, norm = before.head.dense.weight[kept], before.head.norm
    hidden = before.head.act(F.linear(first, dense))
    hidden = F.layer_norm(hidden, (45,), norm.weight[kept], None, norm.eps)
    expected = F.linear(hidden, before.classifier.weight[:, kept], before.classifier.bias)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
