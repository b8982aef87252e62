"""REAP: the mean over the tokens sent to an expert of its gate times the norm of its output."""

import pytest
import torch
from conftest import randomise, token_ids
from families import NEW, build, values_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.errors import ConfigError, TraceError
from prunekit.importance import Reap

IDS = token_ids(4, 9)


def build_deepseek():
    """Groups of experts, a correction that only the choice sees, a shared expert."""
    values = NEW | {
        **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12},
        **{"v_head_dim": 10, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        **{"moe_intermediate_size": 24, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("deepseek_v3", num_key_value_heads=8, **values)
    return randomise(AutoModelForCausalLM.from_config(config))


MODELS = {
    "mixtral": lambda: build("mixtral", values_of("mixtral")),
    "qwen2_moe": lambda: build("qwen2_moe", values_of("qwen2_moe")),
    "deepseek_v3": build_deepseek,
}


def trace(model):
    return prunekit.trace(model, {"input_ids": IDS[:2, :7], "use_cache": False})


def batches_of(ids):
    return [{"input_ids": part, "use_cache": False} for part in ids.split(2)]


def brute_force(model, experts, ids):
    """Token by token, in float64: the mean of gate · ‖f(x)‖ over the tokens of each expert."""
    calls = []
    hook = experts.register_forward_hook(lambda _, args, __: calls.append(args))
    with torch.no_grad():
        for batch in batches_of(ids):
            model(**batch)
    hook.remove()
    added = [[] for _ in range(len(experts.down_proj))]
    up, down = (weight.detach().double() for weight in (experts.gate_up_proj, experts.down_proj))
    for hidden, chosen, gates in calls:
        for x, own, weights in zip(hidden.double(), chosen, gates.double(), strict=True):
            for expert, gate in zip(own.tolist(), weights, strict=True):
                first, second = (up[expert] @ x).chunk(2)
                output = down[expert] @ (experts.act_fn(first) * second)
                added[expert].append(float(gate * output.norm()))
    return torch.tensor([sum(own) / max(len(own), 1) for own in added], dtype=torch.float64)


@pytest.mark.parametrize("family", MODELS)
def test_scores_are_the_mean_norm_of_what_an_expert_adds(family):
    model = MODELS[family]().train()
    graph = trace(model)
    groups = [g for g in graph.groups if g.kind == "expert" and g.prunable]
    scores = Reap().score(model, graph, groups, batches_of(IDS))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()
    for group in groups:
        expected = brute_force(model, model.model.layers[group.layer].mlp.experts, IDS)
        if family == "deepseek_v3":  # a unit is one expert of each of the two groups
            expected = expected.view(2, 4).sum(0)
        assert len(scores[group.name].unique()) > 1
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-4, atol=1e-6)


def test_padding_and_experts_without_tokens_do_not_count(monkeypatch):
    model = MODELS["mixtral"]()
    router = model.model.layers[1].mlp.gate
    router.forward = lambda x: (None, torch.full((len(x), 2), 0.5), torch.tensor([[1, 3]] * len(x)))
    graph = trace(build("mixtral", values_of("mixtral")))
    groups = [g for g in graph.groups if g.kind == "expert"]
    mask = torch.ones(1, 9, dtype=torch.int64)
    mask[:, 5:] = 0
    short = Reap().score(model, graph, groups, [{"input_ids": IDS[:1, :5]}])
    padded = Reap().score(model, graph, groups, [{"input_ids": IDS[:1], "attention_mask": mask}])
    for group in groups:
        torch.testing.assert_close(padded[group.name], short[group.name], rtol=1e-4, atol=1e-8)
    idle = short["layers.1.mlp.expert"]
    assert (idle == 0).tolist() == [True, False, True, False]


def test_a_run_removes_the_experts_that_add_least(tmp_path):
    model = MODELS["mixtral"]()
    graph = trace(model)
    groups = [g for g in graph.groups if g.kind == "expert"]
    scores = Reap().score(model, graph, groups, batches_of(IDS))
    chosen = ["importance=reap", "groups=expert", "policy=uniform"]
    result = prunekit.prune(
        model, ratio=0.18, method="magnitude", calibration=IDS, overrides=chosen
    )
    assert result.plan.removed
    for name, units in result.plan.removed.items():
        assert sorted(units) == sorted(scores[name].argsort()[: len(units)].tolist())
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_other_groups_and_other_experts_are_refused():
    model = MODELS["mixtral"]()
    graph = trace(model)
    with pytest.raises(ConfigError, match=r"scores experts \(groups=expert\), not layers.0.mlp"):
        Reap().score(model, graph, [graph["layers.0.mlp.experts"]], batches_of(IDS))
    experts = model.model.layers[0].mlp.experts
    own = experts.forward

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = model.model.layers[0].mlp.gate, experts

        def forward(self, hidden):
            rows = hidden.view(-1, hidden.shape[-1])
            _, gates, chosen = self.gate(rows)
            return self.experts(rows, chosen.T, gates).view_as(hidden)

    experts.forward = lambda rows, chosen, gates: own(rows, chosen.T, gates)
    model.model.layers[0].mlp = Block()
    groups = [group for group in graph.groups if group.kind == "expert"]
    with pytest.raises(TraceError, match=r"layers.0.mlp.experts: expected experts that are called"):
        Reap().score(model, graph, groups, batches_of(IDS))
