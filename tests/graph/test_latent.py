"""Latent attention (MLA): heads are units of all matrices that make them, ranks are a kind apart.

Groups of experts: each loses as many, and a router finds as many as it chooses.
"""

import copy

import pytest
import torch
from conftest import randomise, token_ids, zero_consumers
from families import IDS
from transformers import AutoConfig, AutoModelForCausalLM, WavLMConfig, WavLMModel

import prunekit
from prunekit.allocation.limits import find_demands
from prunekit.allocation.scope import Scope
from prunekit.config.compose import check, compose
from prunekit.errors import SurgeryError

RANKS = {"q_lora_rank": 24, "kv_lora_rank": 16}
WIDTHS = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10}
LATENT = {
    **IDS,
    **RANKS,
    **WIDTHS,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
}
MIXTURE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
SPARSE = {"index_topk": 16, "index_n_heads": 4, "index_head_dim": 8}  # no part without rotary
SIZES = {
    "deepseek_v2": LATENT | MIXTURE | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT | MIXTURE,
    "deepseek_v32": LATENT | MIXTURE | SPARSE,
    "minicpm3": LATENT,
}


def build(family, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES[family] | more)
    return randomise(AutoModelForCausalLM.from_config(config))


def trace(model):
    return prunekit.trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=token_ids(3, 9, seed=2), use_cache=False).logits


def short_members(group):
    return {
        (member.parameter.rpartition(".self_attn.")[2], member.dim, member.role)
        for member in group.members
    }


@pytest.mark.parametrize("family", SIZES)
def test_heads_go_from_all_matrices_that_make_them(family, tmp_path):
    model = build(family)
    graph = trace(model)
    heads = [group for group in graph.groups if group.kind == "attention"]
    assert len(heads) == 2
    for group in heads:
        assert (group.num_units, group.prunable, group.exact) == (8, True, True)
        assert short_members(group) == {
            ("q_b_proj.weight", 0, "producer"),
            ("kv_b_proj.weight", 0, "producer"),
            ("o_proj.weight", 1, "consumer"),
        }
    removed = {group.name: [1, 6] for group in heads[-1:]}
    ffns = [group for group in graph.groups if group.kind == "mlp" and group.prunable]
    removed |= {group.name: range(3, 11) for group in ffns if group.exact}
    masked = copy.deepcopy(model)
    zero_consumers(masked, graph, removed)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    logits = logits_of(model)
    assert logits.std() > 0.01
    torch.testing.assert_close(logits, logits_of(masked), rtol=1e-3, atol=1e-3)

    settings = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    text = masked.generate(token_ids(1, 5), **settings)
    assert torch.equal(model.generate(token_ids(1, 5), **settings), text)
    prunekit.save_pretrained(model, tmp_path / "model")
    assert torch.equal(logits_of(prunekit.from_pretrained(tmp_path / "model")), logits)


def keep_first(reference, dense):
    """Give a smaller model the first positions of each of the dense model's tensors."""
    state = {**dense.state_dict(), **dict(dense.named_buffers())}
    with torch.no_grad():
        for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
            tensor.copy_(state[name][tuple(map(slice, tensor.shape))])
    return reference


@pytest.mark.parametrize("family", ["deepseek_v3", "minicpm3"])
def test_latents_are_a_kind_apart_and_equal_a_smaller_model(family, tmp_path):
    model = build(family)
    graph = trace(model)
    latents = [group for group in graph.groups if group.kind == "latent"]
    assert [(g.layer, g.num_units) for g in latents] == [(0, 24), (0, 16), (1, 24), (1, 16)]
    assert "self_attn.latent" in latents[0].name
    removed = {g.name: [*range(g.num_units - 4, g.num_units)] for g in latents}
    reference = build(family, q_lora_rank=20, kv_lora_rank=12)
    # Rotary positions lie behind the latent in one matrix: the smaller model has them further up.
    for layer, dense in zip(reference.model.layers, model.model.layers, strict=True):
        rows = dense.self_attn.kv_a_proj_with_mqa.weight
        moved = torch.cat([rows[:12], rows[16:]])
        layer.self_attn.kv_a_proj_with_mqa.moved = moved.detach()
    keep_first(reference, model)
    for layer in reference.model.layers:
        own = layer.self_attn.kv_a_proj_with_mqa
        own.weight.data.copy_(own.moved)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    assert (model.config.q_lora_rank, model.config.kv_lora_rank) == (20, 12)
    torch.testing.assert_close(logits_of(model), logits_of(reference), rtol=1e-3, atol=1e-3)
    prunekit.save_pretrained(model, tmp_path / "model")
    assert torch.equal(logits_of(prunekit.from_pretrained(tmp_path / "model")), logits_of(model))


def test_latents_of_one_size_are_told_apart():
    model = build("deepseek_v3", q_lora_rank=16)
    graph = trace(model)
    queries, values = (g for g in graph.groups if g.kind == "latent" and g.layer == 1)
    assert "q_b_proj" in queries.consumers[0].parameter
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({queries.name: [0, 1]}))
    attention = model.model.layers[1].self_attn
    assert (attention.q_lora_rank, attention.kv_lora_rank) == (14, 16)
    graph = trace(model)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({values.name: [0, 1, 2, 3]}))
    assert (attention.q_lora_rank, attention.kv_lora_rank) == (14, 12)


def test_latents_are_pruned_on_request_only():
    ids = token_ids(8, 12)
    kinds = {}
    for groups in ("block", "latent"):
        result = prunekit.prune(
            build("minicpm3"),
            ratio=0.1,
            method="magnitude",
            calibration=ids,
            overrides=[f"groups={groups}", "shapes=free"],
        )
        kinds[groups] = {result.graph[name].kind for name in result.plan.removed}
        if groups == "latent":  # rotary positions are read in pairs by some
            assert all(len(units) % 2 == 0 for units in result.plan.removed.values())
    assert kinds == {"block": {"attention", "mlp"}, "latent": {"latent"}}


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_each_group_of_experts_loses_as_many(family, tmp_path):
    model = build(family)
    graph = trace(model)
    groups = [group for group in graph.groups if group.kind == "expert"]
    outer, inner = groups
    assert (outer.num_units, inner.num_units) == (2, 4)
    assert not outer.prunable
    assert "groups of experts" in outer.reason
    assert inner.prunable
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({inner.name: [3]}))
    assert model.config.n_routed_experts == 8  # the dense layer keeps the model's number
    assert model.model.layers[1].mlp.experts.gate_up_proj.shape[0] == 6
    reference = build(family, n_routed_experts=6)
    dense = build(family)
    kept = torch.tensor([0, 1, 2, 4, 5, 6])
    state = {**dense.state_dict(), **dict(dense.named_buffers())}
    with torch.no_grad():
        for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
            own = state[name]
            tensor.copy_(own if own.shape == tensor.shape else own[kept])
    torch.testing.assert_close(logits_of(model), logits_of(reference), rtol=1e-4, atol=1e-4)
    prunekit.save_pretrained(model, tmp_path / "model")
    assert torch.equal(logits_of(prunekit.from_pretrained(tmp_path / "model")), logits_of(model))


@pytest.mark.parametrize(
    ("more", "fewest"),
    [
        ({}, 2),  # two experts of the one group that is chosen, which is scored by two
        ({"n_group": 1}, 2),
        ({"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "n_routed_experts": 16}, 2),
        ({"n_group": 2, "topk_group": 2, "num_experts_per_tok": 7, "n_routed_experts": 16}, 4),
    ],
)
def test_a_router_finds_as_many_experts_as_it_chooses(more, fewest):
    model = build("deepseek_v3", **more)
    graph = trace(model)
    groups = [g for g in graph.groups if g.kind == "expert" and g.prunable]
    (group,) = groups
    assert group.fewest == fewest
    demands = find_demands(model, graph, groups, check(compose([])), Scope())
    assert demands.floors[group.name] == fewest
    too_many = prunekit.PruningPlan({group.name: range(group.num_units - fewest + 1)})
    if "num_experts_per_tok" not in more:
        with pytest.raises(SurgeryError, match=group.name):
            prunekit.apply_plan(model, graph, too_many)
    prunekit.apply_plan(
        model, graph, prunekit.PruningPlan({group.name: range(group.num_units - fewest)})
    )


def test_an_ffn_behind_a_stream_that_is_seen_as_heads_is_no_latent():
    """WavLM's gate of relative positions views the residual stream head by head."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    convolutions = {"conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (5,)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    config = WavLMConfig(
        **sizes, **convolutions, **positions, num_hidden_layers=2, num_feat_extract_layers=1
    )
    model = WavLMModel(config).eval()
    graph = prunekit.trace(model, {"input_values": torch.randn(2, 100)})
    kinds = {g.kind: g.num_units for g in graph.groups if "feed_forward" in g.name and g.exact}
    assert kinds == {"mlp": 24}
