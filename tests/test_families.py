"""Architectures the tracer was never told about: pruned equals masked, or a smaller model built
directly.
"""

import copy

import pytest
import torch
from conftest import token_ids, zero_units
from families import (
    ALL,
    CASES,
    DEEP,
    EXPERTS,
    GROUPED,
    build,
    build_deep,
    build_with,
    implementations,
    narrow_heads,
    values_of,
)

import prunekit
from prunekit.errors import CheckpointError, SurgeryError

NAMES = [f"{family}-{values.get('num_key_value_heads', '')}".strip("-") for family, values in CASES]
FIXED_HEADS = ("bloom", "falcon:alibi")


def trace(model):
    return prunekit.trace(model, {"input_ids": token_ids(2, 7)})


def test_every_family_is_built_with_every_attention_it_has():
    assert (len(DEEP), len(CASES)) == (34, 55)
    for family in DEEP:
        for attention in ("sdpa", "eager"):
            if attention in implementations(family):
                build_deep(family, attention)
            else:
                with pytest.raises(ValueError, match="does not support an attention impl"):
                    build_with(family, values_of(family), attention)


def agree(model, reference):
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        logits, expected = (m(input_ids=ids, use_cache=False).logits for m in (model, reference))
    assert logits.std() > 0.01
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def cut(model, graph, removed):
    masked = zero_units(copy.deepcopy(model), graph, removed)
    pruned = copy.deepcopy(model)
    prunekit.apply_plan(pruned, graph, prunekit.PruningPlan(removed))
    return pruned, masked


def _both():
    """Every case; two key-value heads with both implementations, other numbers with one in turn."""
    for position, (name, (family, values)) in enumerate(zip(NAMES, CASES, strict=True)):
        available = implementations(family)
        if "num_key_value_heads" in values and values["num_key_value_heads"] != 2:
            available = (available[position % len(available)],)
        for attention in available:
            yield pytest.param(family, values, attention, id=f"{name}-{attention}")


def check_heads(model, graph, family, kv):
    """The groups of heads and residual channels are those that the configuration promises."""
    heads = 8 if family != "gptj" else 4
    units = {"attention": [], "query_head": [], "channel": []}
    for group in graph.groups:
        units.setdefault(group.kind, []).append((group.layer, group.num_units))
    if family in FIXED_HEADS:
        fixed = [group for group in graph.groups if group.kind == "attention"]
        assert not any(group.prunable for group in fixed)
        assert all("fixed by" in group.reason for group in fixed)
    else:
        assert units["attention"] == [(layer, kv if kv > 1 else heads) for layer in (0, 1)]
        expected = [(layer, heads // kv) for layer in (0, 1)] if 1 < kv < heads else []
        assert units["query_head"] == expected
    assert units["channel"] == [(None, model.config.hidden_size)]


@pytest.mark.parametrize(("family", "values", "attention"), _both())
def test_pruned_equals_masked(family, values, attention):
    model = build(family, values, attention)
    graph = trace(model)
    kv = values.get("num_key_value_heads", 1)
    check_heads(model, graph, family, kv)

    exact = [group for group in graph.groups if group.prunable and group.exact]
    wanted = {"attention", "query_head", "mlp"}
    removed = {g.name: [1, 3, 5, 6] if g.kind == "mlp" else [0] for g in exact if g.kind in wanted}
    kinds = {graph[name].kind for name in removed}
    assert kinds >= ({"mlp"} if family in (*FIXED_HEADS, "olmo2") else {"mlp", "attention"})

    narrower = narrow_heads(graph)
    # The class divides by the root of an attribute by which it also reshapes.
    refused = family.startswith("falcon") and attention == "eager"
    if refused and family != "falcon:alibi":
        with pytest.raises(SurgeryError, match="head_dim"):
            cut(model, graph, narrower)
    if refused or not all(graph[name].exact for name in narrower):
        narrower = {}
    # At two key-value heads, and where there is no choice, both kinds of cuts are tried by
    # themselves; at other numbers in one plan.
    by_themselves = kv == 2 or "num_key_value_heads" not in values
    plans = [removed, narrower] if by_themselves else [removed | narrower]
    for plan in filter(None, plans):
        pruned, masked = cut(model, graph, plan)
        agree(pruned, masked)
        if plan is plans[0]:
            check_cache(pruned, masked)


def check_cache(pruned, masked):
    """The key-value cache keeps up."""
    settings = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    ids = token_ids(1, 5, seed=3)
    text = masked.generate(ids, use_cache=False, **settings)
    assert torch.equal(pruned.generate(ids, **settings), text)


def shrunk(family, values, dense, **smaller):
    """The family's own class built smaller, holding the first positions of each of the dense
    model's tensors.
    """
    reference = build(family, values | smaller)
    state = dense.state_dict()
    with torch.no_grad():
        for name, tensor in reference.state_dict().items():
            tensor.copy_(state[name][tuple(slice(size) for size in tensor.shape)])
        buffers = dict(dense.named_buffers())
        for name, buffer in reference.named_buffers():
            if buffer.ndim == 0:  # an embedding's scale, which the pruned model keeps
                buffer.copy_(buffers[name])
    return reference


# Classes that take the width of a head from the hidden size unless told.
TOLD = ("qwen2", "phi3", "granite", "cohere", "olmo", "olmo2", "starcoder2", "smollm3")
TOLD += ("qwen2_moe", "mixtral")
# Classes that can't be told: no smaller model can be built directly.
DERIVED = ("phi", "stablelm", "helium", "falcon")


@pytest.mark.parametrize("family", ALL)
def test_residual_channels_equal_a_smaller_model(family):
    values = values_of(family)
    if family in TOLD:
        values = values | {"head_dim": 6}
    model = build(family, values)
    graph = trace(model)
    (channel,) = (group for group in graph.groups if group.kind == "channel")
    assert channel.prunable
    assert not channel.exact
    assert "over it" in channel.reason
    width = model.config.hidden_size
    pruned = copy.deepcopy(model)
    prunekit.apply_plan(
        pruned, graph, prunekit.PruningPlan({channel.name: list(range(width - 8, width))})
    )
    assert pruned.config.hidden_size == width - 8
    if family in {**GROUPED, **EXPERTS} and family not in DERIVED:
        agree(pruned, shrunk(family, values, model, hidden_size=width - 8))


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_equal_a_smaller_mixture(family):
    values = values_of(family)
    model = build(family, values)
    graph = trace(model)
    experts = [group for group in graph.groups if group.kind == "expert"]
    assert [(g.layer, g.num_units, g.prunable, g.exact) for g in experts] == [
        (0, 4, True, False),
        (1, 4, True, False),
    ]
    assert "chooses among them" in experts[0].reason or "normalises" in experts[0].reason
    members = {
        member.parameter.removeprefix("model.layers.0.mlp.") for member in experts[0].members
    }
    assert members == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    pruned = copy.deepcopy(model)
    prunekit.apply_plan(pruned, graph, prunekit.PruningPlan({group.name: [3] for group in experts}))
    name = "num_local_experts" if family == "mixtral" else "num_experts"
    agree(pruned, shrunk(family, values, model, **{name: 3}))
    with pytest.raises(SurgeryError, match=experts[0].name):
        prunekit.apply_plan(
            model, graph, prunekit.PruningPlan({experts[0].name: [0, 1, 2]})
        )  # the router takes two


@pytest.mark.parametrize("kv_heads", [8, 4])
def test_a_norm_over_all_heads_is_inexact_and_equals_a_smaller_model(kv_heads):
    values = GROUPED["olmo2"] | {"num_key_value_heads": kv_heads, "head_dim": 6}
    model = build("olmo2", values)
    graph = trace(model)
    groups = [group for group in graph.groups if group.kind == "attention"]
    assert all(
        group.prunable and not group.exact and "aten.mean" in group.reason for group in groups
    )
    pruned = copy.deepcopy(model)
    prunekit.apply_plan(
        pruned, graph, prunekit.PruningPlan({group.name: [kv_heads - 1] for group in groups})
    )
    smaller = {"num_key_value_heads": kv_heads - 1, "num_attention_heads": 8 - 8 // kv_heads}
    agree(pruned, shrunk("olmo2", values, model, **smaller))


def test_a_norm_over_each_head_is_inexact_and_equals_a_smaller_model():
    values = GROUPED["qwen3"] | {"num_key_value_heads": 4}
    model = build("qwen3", values)
    graph = trace(model)
    removed = narrow_heads(graph)
    inexact = [name for name in removed if not graph[name].exact]
    assert [graph[name].num_units for name in inexact] == [3], (
        "three rotary pairs, the same in all layers"
    )
    removed = {
        name: [2] if name in inexact else [2, 5] for name in removed
    }  # position 2 and its other half, 5
    pruned = copy.deepcopy(model)
    prunekit.apply_plan(pruned, graph, prunekit.PruningPlan(removed))
    reference = build("qwen3", values | {"head_dim": 4})
    kept = torch.tensor([6 * head + i for head in range(8) for i in (0, 1, 3, 4)])
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            dense = model.get_parameter(name)
            for dim, size in enumerate(parameter.shape):
                if size != dense.shape[dim]:
                    dense = dense.index_select(dim, kept[kept < dense.shape[dim]])
            parameter.copy_(dense)
    reference.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:2]
    for layer in reference.model.layers:
        layer.self_attn.scaling = 6**-0.5
    agree(pruned, reference)


@pytest.mark.parametrize("family", ALL)
def test_pruned_model_survives_the_disk(family, tmp_path):
    values = values_of(family)
    model = build(family, values)
    graph = trace(model)
    groups = [
        group
        for group in graph.groups
        if group.prunable and group.kind in ("attention", "mlp", "expert")
    ]
    removed = {g.name: [1, 3, 5, 6] if g.kind == "mlp" else [0] for g in groups if g.layer == 1}
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(tmp_path / "model")
    again.set_attn_implementation(model.config._attn_implementation)
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        again.generate(ids[:1], **settings), model.generate(ids[:1], use_cache=False, **settings)
    )


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "phi3", "gemma2", "cohere", "helium", "gpt2", "opt", "xglm"]
)
def test_narrower_heads_survive_the_disk(family, tmp_path):
    """The frequencies of the rotary pairs that stay are saved; the scores keep the scale of the
    dense model.
    """
    model = build(family, values_of(family))
    graph = trace(model)
    removed = narrow_heads(graph) | {
        g.name: [1] for g in graph.groups if g.kind == "attention" and g.layer == 1
    }
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(
        tmp_path / "model", attn_implementation=model.config._attn_implementation
    )
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    prunekit.save_pretrained(again, tmp_path / "copy")


def test_a_width_the_config_can_not_hold_survives_the_disk(tmp_path):
    model = build("falcon", values_of("falcon"))
    graph = trace(model)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(narrow_heads(graph)))
    prunekit.save_pretrained(model, tmp_path / "model")  # the class computes head_dim
    again = prunekit.from_pretrained(tmp_path / "model")
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "qwen3_moe"])
def test_fewer_residual_channels_survive_the_disk(family, tmp_path):
    """Also where the class takes the width of heads from the number of channels."""
    model = build(family, values_of(family))
    graph = trace(model)
    (channel,) = (group for group in graph.groups if group.kind == "channel")
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({channel.name: list(range(8))}))
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(
        tmp_path / "model", attn_implementation=model.config._attn_implementation
    )
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    graph = trace(again)
    (channel,) = (group for group in graph.groups if group.kind == "channel")
    assert channel.num_units == again.config.hidden_size == model.config.hidden_size


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_channels_that_scale_the_embedding_are_not_saved(family, tmp_path):
    """transformers' own class would take the folder and compute other numbers, and nobody would
    notice.
    """
    model = build(family, values_of(family))
    graph = trace(model)
    (channel,) = (group for group in graph.groups if group.kind == "channel")
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({channel.name: list(range(8))}))
    with pytest.raises(CheckpointError, match="embed_scale"):
        prunekit.save_pretrained(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "gpt_neo", "gptj", "gpt_neox", "qwen2", "phi3", "llama"]
)
@pytest.mark.parametrize("heads", [[0], [0, 1, 2, 3]])
def test_as_many_heads_cut_in_every_layer_survive_the_disk(family, heads, tmp_path):
    """Also where the class takes their width from their number, and whether that divides the width
    or not.
    """
    model = build(family, values_of(family))
    graph = trace(model)
    removed = {g.name: heads[: g.num_units - 1] for g in graph.groups if g.kind == "attention"}
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(
        tmp_path / "model", attn_implementation=model.config._attn_implementation
    )
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("experts", [([0], [0]), ([0], [1, 2]), ([], [3])])
def test_fewer_experts_survive_the_disk(family, experts, tmp_path):
    model = build(family, values_of(family))
    graph = trace(model)
    removed = {
        g.name: experts[g.layer] for g in graph.groups if g.kind == "expert" and experts[g.layer]
    }
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(tmp_path / "model")
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6
        )
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()
    )
