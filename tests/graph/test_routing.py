"""Routing: whatever is indexed by the same routing is one axis, cut together or not at all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, token_ids
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM

import prunekit
from prunekit.errors import ConfigError, TraceError

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_scaling": None,
    "pad_token_id": 0,
}
LOOKUPS = {
    "index": lambda table, ids: table[ids],
    "index_select": lambda table, ids: table.index_select(0, ids),
    "embedding": lambda table, ids: F.embedding(ids, table.flatten(1)).view(-1, *table.shape[1:]),
}


class Mixture(nn.Module):
    """Experts with biases, gains and a correction that only the choice sees."""

    def __init__(self, experts, look_up, top=2, shift=0, join=None):
        super().__init__()
        self.look_up, self.top, self.shift, self.join = look_up, top, shift, join
        self.router = nn.Linear(6, experts)
        self.register_buffer("correction", torch.randn(experts))
        self.up, self.up_bias = (nn.Parameter(torch.empty(experts, *s)) for s in ((6, 5), (5,)))
        self.down, self.down_bias = (nn.Parameter(torch.empty(experts, *s)) for s in ((5, 6), (6,)))
        self.gain = nn.Parameter(torch.empty(experts, 1))

    def forward(self, x):
        scores = self.router(x).sigmoid()
        wanted = scores + self.correction
        if self.top == 1:
            chosen = wanted.argmax(-1, keepdim=True)
        elif self.join:  # the best one, and the best of the others
            best = wanted.argmax(-1)
            others = wanted.scatter(1, best.unsqueeze(-1), float("-inf"))
            chosen = self.join(best, others.argmax(-1))
        else:
            chosen = wanted.topk(self.top, dim=-1).indices
        weights = scores.gather(1, chosen)
        ids = chosen.reshape(-1)
        gain = self.look_up(self.gain, ids if not self.shift else ids % self.shift)
        rows = x.repeat_interleave(self.top, 0).unsqueeze(1)
        hidden = torch.bmm(rows, self.look_up(self.up, ids)).squeeze(1)
        hidden = (hidden + self.look_up(self.up_bias, ids)).relu().unsqueeze(1)
        out = torch.bmm(hidden, self.look_up(self.down, ids)).squeeze(1)
        out = (out + self.look_up(self.down_bias, ids)) * gain * weights.reshape(-1, 1)
        return out.view(len(x), self.top, 6).sum(1)


def smaller(build, dense, kept):
    """A model built with fewer experts, that holds these experts of the dense one."""
    model = build(len(kept)).eval()
    held = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    with torch.no_grad():
        for name, own in [*model.named_parameters(), *model.named_buffers()]:
            tensor = held[name]
            own.copy_(tensor if own.shape == tensor.shape else tensor[kept])
    return model


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("look_up", LOOKUPS)
def test_all_that_one_routing_looks_up_is_cut_together(look_up, top):
    def build(experts):
        return Mixture(experts, LOOKUPS[look_up], top)

    model, x = randomise(build(5), 1), torch.randn(9, 6)
    graph = prunekit.trace(model, (x,))
    (experts,) = (group for group in graph.groups if group.kind == "expert")
    assert (experts.num_units, experts.prunable, experts.exact) == (5, True, False)
    names = {"router.weight", "router.bias", "correction", "gain"}
    names |= {"up", "up_bias", "down", "down_bias"}
    assert {(m.parameter, m.dim) for m in experts.members} == {(name, 0) for name in names}
    (channels,) = (
        g for g in graph.groups if ("up", 2) in {(m.parameter, m.dim) for m in g.members}
    )
    assert {m.parameter: m.role for m in channels.members}["down"] == "consumer"

    reference = smaller(build, model, [0, 2, 4])
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({experts.name: [1, 3]}))
    assert reference(x).std() > 0.01
    torch.testing.assert_close(model(x), reference(x))


JOINS = {
    "stack": lambda *chosen: torch.stack(chosen, 1),
    "cat": lambda *chosen: torch.cat([one.unsqueeze(1) for one in chosen], -1),
}


@pytest.mark.parametrize("join", JOINS)
def test_choices_that_are_joined_point_to_the_same_experts(join):
    def build(experts):
        return Mixture(experts, LOOKUPS["index"], join=JOINS[join])

    model, x = randomise(build(5), 1), torch.randn(9, 6)
    graph = prunekit.trace(model, (x,))
    (experts,) = (group for group in graph.groups if group.kind == "expert")
    assert (experts.num_units, experts.prunable, experts.exact) == (5, True, False)
    reference = smaller(build, model, [0, 2, 4])
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({experts.name: [1, 3]}))
    torch.testing.assert_close(model(x), reference(x))


def test_a_table_that_is_looked_up_by_computed_numbers_keeps_all_experts():
    model, x = randomise(Mixture(5, LOOKUPS["index"], shift=3), 1), torch.randn(9, 6)
    graph = prunekit.trace(model, (x,))
    owners = {m.parameter: g for g in graph.groups for m in g.members if m.dim == 0}
    for name in ("router.weight", "up", "down_bias", "gain"):
        assert not owners[name].prunable
        assert "looks" in owners[name].reason
    with pytest.raises(TraceError):
        prunekit.apply_plan(model, graph, prunekit.PruningPlan({owners["up"].name: [0]}))


def build_oss(experts):
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=experts)).eval()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm"])
def test_stacked_biases_go_with_their_experts(how, tmp_path):
    torch.manual_seed(0)
    model, ids = randomise(build_oss(4)), token_ids(3, 9)
    model.set_experts_implementation(how)
    graph = prunekit.trace(model, {"input_ids": ids, "use_cache": False})
    experts = [group for group in graph.groups if group.kind == "expert"]
    members = {m.parameter.removeprefix("model.layers.0.mlp.") for m in experts[0].members}
    assert members == {
        *("router.weight", "router.bias", "experts.gate_up_proj", "experts.gate_up_proj_bias"),
        *("experts.down_proj", "experts.down_proj_bias"),
    }
    reference = smaller(build_oss, model, [1, 2, 3])
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({g.name: [0] for g in experts}))
    with torch.no_grad():
        logits, right = (m(input_ids=ids, use_cache=False).logits for m in (model, reference))
    torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(tmp_path / "model", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, logits)


class InOneMatrix(Mixture):
    """Experts that lie one after another in two matrices, each taken out by a view, and an FFN."""

    def __init__(self, experts):
        super().__init__(experts, LOOKUPS["index"])
        self.wide, self.narrow = nn.Linear(6, 40), nn.Linear(40, 6)
        self.up, self.down = (nn.Parameter(torch.empty(experts * 5, 6)) for _ in range(2))

    def forward(self, x):
        weights, out = self.router(x).softmax(-1), torch.zeros_like(x)
        up, down = (matrix.view(weights.shape[1], -1, 6) for matrix in (self.up, self.down))
        for expert in range(weights.shape[1]):
            out = out + (x @ up[expert].T).relu() @ down[expert] * weights[:, expert, None]
        return out + self.narrow(self.wide(x).relu())


def test_a_matrix_that_is_used_in_parts_is_no_consumer_of_layer_wise_pruning():
    """It stays whole, with the reason; where nothing else can be cut that is an error."""
    model, batch = randomise(InOneMatrix(4), 1), {"x": torch.randn(90, 6)}
    settings = {"ratio": 0.1, "calibration": [batch]}
    result = prunekit.prune(cut := copy.deepcopy(model), **settings, overrides=["groups=mlp"])
    assert cut.down.shape == model.down.shape and cut.narrow.in_features < 40
    (left,) = result.report["left_out"]
    assert (left["groups"], left["count"]) == ("mlp.0", 1)
    reason, advice = left["reason"].removesuffix(" cuts it").split("; ")
    assert "expects a product with all of a matrix, down is used in parts" in reason
    given = ["groups=mlp", "importance=magnitude", "policy=uniform", "shapes=free"]
    overrides = [*given, *advice.split()]
    result = prunekit.prune(cut := copy.deepcopy(model), **settings, overrides=overrides)
    assert cut.down.shape != model.down.shape
    assert result.report["ratio"]["achieved"] == pytest.approx(0.1, abs=0.02)
    model.wide = model.narrow = nn.Identity()  # the experts are all that there is
    with pytest.raises(ConfigError, match="down is used in parts .mlp.; use schedule=oneshot"):
        prunekit.prune(model, **settings, overrides=["groups=mlp"])
