"""Groups that lose all of their units: layers without attention, without FFN, without both."""

import copy

import pytest
import torch
from conftest import example, tiny_llama, token_ids, zero_consumers
from families import build_deep
from torch import nn
from transformers import StaticCache
from transformers.configuration_utils import get_head_shapes

import prunekit
from prunekit.errors import TraceError
from prunekit.graph import trace
from prunekit.graph.capture import meta_copy
from prunekit.plan import PruningPlan
from prunekit.surgery import apply_plan

FAMILIES = ("llama", "qwen2", "gpt2", "mixtral", "qwen2_moe", "gemma2", "olmo2", "opt", "gpt_neox")
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def everything(graph, **kinds):
    """A plan that takes all units of these groups: kind → layers."""
    return {
        group.name: list(range(group.num_units))
        for group in graph.groups
        if group.layer in kinds.get(group.kind, ())
    }


def emptied(model):
    """(the masked model, the cut one): the first layer has no attention, the second no FFN, the
    third neither.
    """
    graph = trace(model, {"input_ids": token_ids(2, 7)})
    removed = everything(graph, attention=(0, 2), mlp=(1, 2))
    assert len({(graph[name].kind, graph[name].layer) for name in removed}) == 4
    masked = copy.deepcopy(model)
    zero_consumers(masked, graph, removed)
    apply_plan(model, graph, PruningPlan(removed))
    assert sum(
        p.numel() for p in model.parameters()
    ) == graph.num_parameters() - graph.removed_parameters(removed)
    return masked, model


@pytest.mark.parametrize("family", FAMILIES)
def test_an_emptied_model_is_the_masked_one(family, tmp_path):
    masked, model = emptied(build_deep(family, layers=4))
    ids, mask = token_ids(3, 9, seed=2), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0  # padded on the left
    with torch.no_grad():
        expected = masked(input_ids=ids, attention_mask=mask).logits
        logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, 4:], expected[1, 4:], rtol=1e-4, atol=1e-4)
    for how in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
        wanted = masked.generate(ids, attention_mask=mask, **GREEDY | how)
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY | how), wanted), how
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, logits)
    assert torch.equal(again.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


def test_attention_implementations_and_half_precision():
    """Eager, and weights in bfloat16; a masked model in bfloat16 computes the same bits."""
    masked, model = (each.to(torch.bfloat16) for each in emptied(tiny_llama(layers=4)))
    ids = token_ids(3, 9, seed=2)
    for attention in ("eager", "sdpa"):
        masked.set_attn_implementation(attention)
        model.set_attn_implementation(attention)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, masked(input_ids=ids).logits)


def test_an_emptied_model_is_traced_cut_and_trained_again():
    """Channels go from the weights that are left; whole layers move; gradients flow."""
    masked, model = emptied(tiny_llama(layers=4))
    graphs = [trace(each, example()) for each in (masked, model)]
    kinds = {(group.kind, group.layer) for group in graphs[1].groups}
    assert not kinds & {("attention", 0), ("mlp", 1), ("attention", 2), ("mlp", 2)}
    assert {("mlp", 0), ("attention", 1), ("attention", 3), ("mlp", 3)} <= kinds
    removed = {"channel": [3, 11], "layers": [1], "layers.3.mlp": [0]}
    for each, graph in zip((masked, model), graphs, strict=True):
        apply_plan(each, graph, PruningPlan(removed))
    ids = token_ids(3, 9, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, masked(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
    model(input_ids=ids, labels=ids).loss.backward()
    bias = model.model.layers[0].self_attn.o_proj.bias
    assert bias.grad.abs().sum() > 0
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_a_failed_cut_puts_modules_back():
    model = tiny_llama()
    graph = trace(model, example())
    ids = token_ids()
    before = model(input_ids=ids).logits
    plan = PruningPlan(everything(graph, attention=(0, 1)))
    kind = type(model.model.layers[0].self_attn)
    from prunekit.surgery.cut import cut_model

    changes = cut_model(model, graph, plan.removed)
    assert type(model.model.layers[0].self_attn) is not kind
    changes.undo()
    assert type(model.model.layers[0].self_attn) is kind
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("layers.0.self_attn.query_head", "its attention group is what can go as a whole"),
        ("channel", "only attention heads and FFN channels can all go, not units of kind channel"),
        ("layers", "a model needs a layer"),
    ],
)
def test_what_can_not_go_as_a_whole(name, match):
    graph = trace(tiny_llama(), example())
    plan = PruningPlan({name: range(graph[name].num_units)})
    with pytest.raises(TraceError, match=f"^{name}: at least one of .* must stay: {match}"):
        plan.check(graph)


class Doubled(nn.Module):
    """An FFN that returns more than what its second linear makes."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.Identity()

    def forward(self, hidden):
        return self.down(self.norm(self.up(hidden)).relu()) * 2 + 1


class Normed(Doubled):
    """The same, with a module in its middle that is no linear."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.layers = nn.ModuleList([block(), block()])

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("block", [Doubled, Normed])
def test_a_module_that_does_more_is_not_replaced(block):
    """Plain linears run at a width of zero; modules of other kinds might not."""
    torch.manual_seed(0)
    net, hidden = Net(block), torch.randn(3, 8)
    graph = trace(net, (hidden,))
    group = next(group for group in graph.groups if group.layer == 0 and group.num_units == 12)
    assert group.sublayer is None
    plan = PruningPlan({group.name: range(12)})
    if block is Normed:
        with pytest.raises(TraceError, match="does more than to return what they make"):
            plan.check(graph)
        return
    masked = copy.deepcopy(net)
    masked.layers[0].down.weight.data.zero_()
    apply_plan(net, graph, plan)
    assert net.layers[0].up.weight.shape == (0, 8)
    with torch.no_grad():
        torch.testing.assert_close(net(hidden), masked(hidden))


def test_a_cache_that_is_made_before_it_is_used():
    """It has no heads where the config says so."""
    masked, model = emptied(tiny_llama(layers=4))
    ids, caches = token_ids(3, 9, seed=2), []
    for each in (masked, model):
        heads, width = get_head_shapes(each.config)
        caches.append(StaticCache(config=each.config, max_cache_len=16))
        caches[-1].early_initialization(3, heads, width, torch.float32, torch.device("cpu"))
    assert caches[1].layers[0].keys.shape == (3, 0, 16, 6)
    with torch.no_grad():
        for part in ids.split([5, 3, 1], 1):
            expected, logits = (
                each(input_ids=part, past_key_values=cache).logits
                for each, cache in zip((masked, model), caches, strict=True)
            )
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_on_meta():
    model = tiny_llama()
    graph = trace(model, example())
    skeleton = meta_copy(model)
    removed = everything(graph, attention=range(3), mlp=range(3))
    apply_plan(skeleton, graph, PruningPlan(removed))
    assert skeleton.model.layers[1].self_attn.q_proj.weight.shape == (0, 48)
    assert skeleton.config.per_layer_config[1].num_attention_heads == 0
    assert skeleton.config.per_layer_config[1].intermediate_size == 0
