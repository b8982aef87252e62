"""Architectures the tracer was never told about: pruned equals masked, or a smaller model built
directly.
"""

import copy

import pytest
import torch
from conftest import randomise, token_ids, zero_units
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.errors import CheckpointError, SurgeryError

IDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
NEW = IDS | {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
NAMED = NEW | {"head_dim": 6}
WIDE = NEW | {"hidden_size": 64}  # an even number of rotary dimensions
GPT2 = IDS | {"n_embd": 48, "n_head": 8, "n_layer": 2, "n_positions": 64}
FALCON = IDS | {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "ffn_hidden_size": 40,
}
GROUPED = {  # families with a free number of key-value heads
    "llama": NAMED, "mistral": NAMED, "qwen2": NEW, "qwen3": NAMED, "phi3": NEW, "phi": WIDE, "gemma2": NAMED,
    "gemma3_text": NAMED, "granite": NEW, "cohere": NEW, "glm": NEW | {"head_dim": 8}, "olmo": NEW, "olmo2": NEW,
    "stablelm": WIDE, "starcoder2": NEW, "helium": NAMED, "ernie4_5": NAMED, "smollm3": NEW,
    "falcon": FALCON | {"new_decoder_architecture": True},
}  # fmt: skip
SINGLE = {
    "gpt2": GPT2,
    "gpt_neo": IDS | {"hidden_size": 48, "num_layers": 2, "num_heads": 8, "max_position_embeddings": 64,
                      "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": GPT2 | {"n_head": 4, "rotary_dim": 8},
    "gpt_neox": WIDE,
    "opt": NEW | {"ffn_dim": 40, "word_embed_proj_dim": 48},
    "bloom": IDS | {"hidden_size": 48, "n_layer": 2, "n_head": 8},
    "falcon": FALCON | {"multi_query": True},
    "falcon:dense": FALCON | {"multi_query": False, "parallel_attn": False},
    "falcon:alibi": FALCON | {"multi_query": False, "alibi": True},
    "xglm": IDS | {"d_model": 48, "ffn_dim": 40, "num_layers": 2, "attention_heads": 8, "max_position_embeddings": 64},
    "biogpt": NEW,
}  # fmt: skip
EXPERTS = {
    "mixtral": NEW | {"num_local_experts": 4},
    "qwen2_moe": NEW | {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 32,
                        "num_experts_per_tok": 2},
    "qwen3_moe": NAMED | {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
}  # fmt: skip
CASES = [
    (f, v | {"num_key_value_heads": kv, "num_kv_heads": kv})
    for f, v in GROUPED.items()
    for kv in (8, 2, 1)
]
CASES = [(f, v) for f, v in CASES if f != "falcon" or v["num_kv_heads"] > 1]
CASES += [
    *SINGLE.items(),
    *((f, v | {"num_key_value_heads": kv}) for f, v in EXPERTS.items() for kv in (8, 2)),
]
NAMES = [f"{family}-{values.get('num_key_value_heads', '')}".strip("-") for family, values in CASES]
FIXED_HEADS = ("bloom", "falcon:alibi")


def build(family, values, *implementations):
    """A model of random numbers with the first of these attention implementations that the family
    has.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split(":")[0], **values)
    for attention in implementations or ("sdpa", "eager"):
        try:
            return randomise(
                AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            )
        except ValueError as error:
            assert "does not support an attention implementation" in str(error)
    return None


def configured(family):
    if family in SINGLE and family != "falcon":
        return SINGLE[family]
    return (GROUPED | EXPERTS)[family] | {"num_key_value_heads": 4, "num_kv_heads": 4}


def agree(model, reference, exact=True):
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


def heads_narrowed(graph):
    """A plan that takes two positions off every head's query, key and value."""
    removed = {}
    for extent in graph.extents:
        owned = {
            n: i
            for n, i in extent.owned.items()
            if graph[n].kind == "head_dim" and graph[n].prunable
        }
        if (
            extent.quantity in ("qk_head_dim", "v_head_dim")
            and owned
            and not owned.keys() & removed.keys()
        ):
            name, index = max(
                owned.items(), key=lambda item: item[1].shape[1]
            )  # rotary pairs where there are any
            removed[name] = list(range(2 // index.shape[1]))
    return removed


BOTH = [
    pytest.param(family, values, attention, id=f"{name}-{attention}")
    for i, (name, (family, values)) in enumerate(zip(NAMES, CASES, strict=True))
    for attention in ("sdpa", "eager")
    if values.get("num_key_value_heads", 2) == 2 or attention == ("sdpa", "eager")[i % 2]
]


@pytest.mark.parametrize(("family", "values", "attention"), BOTH)
def test_pruned_equals_masked(family, values, attention):
    model = build(family, values, attention)
    if model is None:  # the family has one implementation only, which the other case tests
        return
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    kinds = {}
    for group in graph.groups:
        kinds.setdefault(group.kind, []).append(group)
    attention_groups = kinds.get("attention", [])
    heads, kv = 8 if family != "gptj" else 4, values.get("num_key_value_heads", 1)
    if family in FIXED_HEADS:
        assert not any(group.prunable for group in attention_groups)
        assert all("fixed by" in group.reason for group in attention_groups)
    else:
        assert [(g.layer, g.num_units) for g in attention_groups] == [
            (i, kv if kv > 1 else heads) for i in (0, 1)
        ]
        query_heads = [group.num_units for group in kinds.get("query_head", [])]
        assert query_heads == ([heads // kv] * 2 if 1 < kv < heads else [])
    assert [group.num_units for group in kinds["channel"]] == [model.config.hidden_size]

    exact = [group for group in graph.groups if group.prunable and group.exact]
    wanted = {"attention", "query_head", "mlp"}
    removed = {g.name: [1, 3, 5, 6] if g.kind == "mlp" else [0] for g in exact if g.kind in wanted}
    assert {graph[name].kind for name in removed} >= (
        {"mlp"} if family in (*FIXED_HEADS, "olmo2") else {"mlp", "attention"}
    )
    pruned, masked = cut(model, graph, removed)
    agree(pruned, masked)
    settings = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    ids = token_ids(1, 5, seed=3)
    assert torch.equal(
        pruned.generate(ids, **settings), masked.generate(ids, use_cache=False, **settings)
    ), "the key-value cache keeps up"

    removed = heads_narrowed(graph)
    if all(graph[name].exact for name in removed) and not (
        family.startswith("falcon") and attention == "eager"
    ):
        pruned, masked = cut(model, graph, removed)
        agree(pruned, masked)
    elif family in ("falcon", "falcon:dense") and attention == "eager":
        with pytest.raises(
            SurgeryError, match="head_dim"
        ):  # it divides by the root of an attribute it also reshapes by
            cut(model, graph, removed)


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
        for (
            name,
            buffer,
        ) in reference.named_buffers():  # an embedding's scale, which the pruned model keeps
            if buffer.ndim == 0:
                buffer.copy_(buffers[name])
    return reference


TOLD = (
    "qwen2",
    "phi3",
    "granite",
    "cohere",
    "olmo",
    "olmo2",
    "starcoder2",
    "smollm3",
    "qwen2_moe",
    "mixtral",
)
"""Classes that take the width of a head from the hidden size unless told."""
DERIVED = ("phi", "stablelm", "helium", "falcon")
"""Classes that can't be told: no smaller model can be built directly."""


@pytest.mark.parametrize("family", [*GROUPED, *SINGLE, *EXPERTS])
def test_residual_channels_equal_a_smaller_model(family):
    values = configured(family)
    if family in TOLD:
        values = values | {"head_dim": 6}
    model = build(family, values)
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
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
    values = configured(family)
    model = build(family, values)
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
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
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
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
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    removed = heads_narrowed(graph)
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


@pytest.mark.parametrize("family", [*GROUPED, *SINGLE, *EXPERTS])
def test_pruned_model_survives_the_disk(family, tmp_path):
    values = configured(family)
    model = build(family, values)
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
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
    model = build(family, configured(family))
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    removed = heads_narrowed(graph) | {
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


def test_a_width_the_config_can_not_hold_is_not_saved(tmp_path):
    model = build("falcon", configured("falcon"))
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(heads_narrowed(graph)))
    with pytest.raises(CheckpointError, match="can't be saved"):  # the class computes head_dim
        prunekit.save_pretrained(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "qwen3_moe"])
def test_fewer_residual_channels_survive_the_disk(family, tmp_path):
    """Also where the class takes the width of heads from the number of channels."""
    model = build(family, configured(family))
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    (channel,) = (group for group in graph.groups if group.kind == "channel")
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({channel.name: list(range(8))}))
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(
        tmp_path / "model", attn_implementation=model.config._attn_implementation
    )
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    graph = prunekit.trace(again, {"input_ids": token_ids(2, 7)})
    (channel,) = (group for group in graph.groups if group.kind == "channel")
    assert channel.num_units == again.config.hidden_size == model.config.hidden_size


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_channels_that_scale_the_embedding_are_not_saved(family, tmp_path):
    """transformers' own class would take the folder and compute other numbers, and nobody would
    notice.
    """
    model = build(family, configured(family))
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
    (channel,) = (group for group in graph.groups if group.kind == "channel")
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({channel.name: list(range(8))}))
    with pytest.raises(CheckpointError, match="embed_scale"):
        prunekit.save_pretrained(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "gpt_neo", "gptj", "gpt_neox", "qwen2", "phi3", "llama"]
)
@pytest.mark.parametrize("heads", [[0], [0, 1], [0, 1, 2, 3]])
def test_as_many_heads_cut_in_every_layer_survive_the_disk(family, heads, tmp_path):
    """Also where the class takes their width from their number, and whether that divides the width
    or not.
    """
    model = build(family, configured(family))
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
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
    model = build(family, configured(family))
    graph = prunekit.trace(model, {"input_ids": token_ids(2, 7)})
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
