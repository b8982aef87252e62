import copy

import pytest
import torch
from conftest import example, interrupt_run, randomise, tiny_llama, token_ids, zero_units
from torch import nn

import prunekit
from prunekit.errors import SurgeryError, TraceError
from prunekit.graph import trace
from prunekit.plan import PruningPlan
from prunekit.surgery import apply_plan, check


def test_gradients_go_with_their_parameters_and_ties_stay():
    model = tiny_llama(tied=True)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    old = model.model.layers[0].mlp.down_proj.weight.grad.clone()
    graph = trace(model, example())
    channel = next(group for group in graph.groups if group.kind == "channel")
    apply_plan(model, graph, PruningPlan({"layers.0.mlp": [1, 2], channel.name: [0]}))
    down = model.model.layers[0].mlp.down_proj
    assert torch.equal(down.weight.grad, old[1:, [0, *range(3, 40)]])
    assert down.in_features == 38
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.embed_tokens.weight.shape == (97, 47)
    assert model.config.hidden_size == 47


def test_channel_cut_equals_a_directly_built_smaller_model():
    model = tiny_llama()
    graph = trace(model, example())
    channel = next(group for group in graph.groups if group.kind == "channel")
    small = copy.deepcopy(model)
    for member in channel.members:
        module, attribute = member.parameter.rsplit(".", 1)
        weight = model.get_parameter(member.parameter)
        kept = [i for i in range(48) if i not in (3, 11)]
        current = getattr(small.get_submodule(module), attribute)
        assert current.shape[member.dim] == 48
        setattr(
            small.get_submodule(module),
            attribute,
            nn.Parameter(weight.index_select(member.dim, torch.tensor(kept))),
        )
    apply_plan(model, graph, PruningPlan({channel.name: [3, 11]}))
    ids = token_ids()
    assert torch.equal(model(input_ids=ids).logits, small(input_ids=ids).logits)


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_generation_with_a_cache_works_afterwards(kv_heads):
    model = tiny_llama(kv_heads)
    prunekit.prune(model, ratio=0.3, calibration=token_ids(8, 12))
    prompt = token_ids(1, 5)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        model.generate(prompt, **kwargs), model.generate(prompt, use_cache=False, **kwargs)
    )


def test_attention_implementation_can_be_switched_afterwards():
    model = tiny_llama(4, "sdpa")
    prunekit.prune(model, ratio=0.3, calibration=token_ids(8, 12))
    before = model(input_ids=token_ids()).logits
    model.set_attn_implementation("eager")
    assert model.model.layers[0].self_attn.config._attn_implementation == "eager"
    torch.testing.assert_close(model(input_ids=token_ids()).logits, before, rtol=1e-4, atol=1e-4)


class Fixed(nn.Module):
    """Its forward multiplies by the width it was built with: a cut changes what it computes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.width = nn.Linear(4, 10), nn.Linear(10, 2), 10

    def forward(self, x):
        return self.b(self.a(x)) * self.a.weight.shape[0] + self.width


def test_a_cut_that_changes_the_outputs_is_undone_and_named():
    net = Fixed()
    graph = trace(net, (torch.randn(3, 4),))
    (group,) = [group for group in graph.groups if group.prunable]
    before = net(torch.ones(2, 4))
    weights = [p.data_ptr() for p in net.parameters()]
    with pytest.raises(SurgeryError, match=rf"^{group.name}: .*the model was put back"):
        apply_plan(net, graph, PruningPlan({group.name: [0, 1]}))
    assert torch.equal(net(torch.ones(2, 4)), before)
    assert [p.data_ptr() for p in net.parameters()] == weights
    assert net.a.out_features == 10


def test_a_failed_cut_of_a_language_model_leaves_config_and_weights(monkeypatch):
    model = tiny_llama(8)
    graph = trace(model, example())
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    monkeypatch.setattr(check, "compare_outputs", lambda *args: check.Fault(text="differs"))
    with pytest.raises(SurgeryError, match=r"layers\.0\.mlp"):
        apply_plan(model, graph, PruningPlan({"layers.0.mlp": [1], "layers.2.self_attn": [0]}))
    assert model.config.to_dict() == config
    assert not model.config.is_heterogeneous
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.model.layers[2].self_attn.config is model.config


@pytest.mark.parametrize(
    ("removed", "match"),
    [
        ({"layers.9.mlp": [0]}, "no group is called 'layers.9.mlp': did you mean"),
        ({"layers.0.mlp": [40]}, r"units must lie in \[0, 40\), got 40 to 40"),
        ({"model.channel": range(48)}, "at least one of 48 units must stay"),
        ({"model.embed_tokens.other": [0]}, "not prunable: .*vocabulary"),
    ],
)
def test_plans_that_do_not_fit(removed, match):
    model = tiny_llama(tied=True)
    with pytest.raises(TraceError, match=match):
        apply_plan(model, trace(model, example()), PruningPlan(removed))


def test_plan_json_round_trip_and_fingerprint():
    model = tiny_llama()
    graph = trace(model, example())
    plan = PruningPlan({"layers.0.mlp": [5, 2], "layers.1.mlp": []}, graph.fingerprint)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.removed == {"layers.0.mlp": [2, 5]}
    other = trace(tiny_llama(2), example())
    with pytest.raises(TraceError, match="made for model"):
        again.check(other)
    with pytest.raises(TraceError, match="twice"):
        PruningPlan({"a": [1, 1]})
    for text in (
        "",
        "[]",
        "{}",
        '{"format": 9, "removed": {}, "fingerprint": null}',
        '{"format": 1, "removed": 3}',
    ):
        with pytest.raises(TraceError):
            PruningPlan.from_json(text)


def test_half_precision_and_meta():
    half = tiny_llama().bfloat16()
    graph = trace(half, example())
    apply_plan(half, graph, PruningPlan({"layers.0.mlp": [1], "layers.1.self_attn": [2]}))
    assert half.model.layers[1].self_attn.o_proj.in_features == 36
    from prunekit.graph.capture import meta_copy

    skeleton = meta_copy(tiny_llama())
    apply_plan(skeleton, graph, PruningPlan({"layers.0.mlp": [1]}))
    assert skeleton.model.layers[0].mlp.up_proj.weight.shape == (39, 48)
    assert skeleton.model.layers[0].mlp.up_proj.weight.is_meta


PLAN = {"layers.0.mlp": [0, 7], "layers.1.self_attn": [1], "layers.2.self_attn.query_head": [0]}


def test_a_model_wrapped_by_peft():
    """The adapters are cut with the layers they adapt, and merge into them afterwards."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = randomise(get_peft_model(tiny_llama(), settings))
    graph = trace(model, example())
    ranks = [
        group for group in graph.groups if group.module.endswith("gate_proj") and group.layer == 0
    ]
    assert [(group.kind, group.num_units) for group in ranks] == [("other", 4)], (
        "a rank is no FFN channel"
    )
    masked = zero_units(copy.deepcopy(model), graph, PLAN)
    apply_plan(model, graph, PruningPlan(PLAN))
    ids = token_ids(3, 9, seed=5)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits, masked(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        gate = model.base_model.model.model.layers[0].mlp.gate_proj
        assert (
            gate.out_features,
            gate.base_layer.out_features,
            gate.lora_B.default.out_features,
        ) == (38, 38, 38)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert merged.config.per_layer_config[0] is not None


def test_bfloat16():
    model = tiny_llama().to(torch.bfloat16)
    graph = trace(model, example())
    masked = zero_units(copy.deepcopy(model), graph, PLAN)
    apply_plan(model, graph, PruningPlan(PLAN))
    ids = token_ids(3, 9, seed=5)
    with torch.no_grad():
        logits, expected = (m(input_ids=ids).logits.float() for m in (model, masked))
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_on_meta_then_filled_equals_cut_in_memory():
    model, skeleton = tiny_llama(), tiny_llama()
    graph = trace(model, example())
    skeleton.to("meta")
    assert trace(skeleton, example()).fingerprint == graph.fingerprint
    apply_plan(skeleton, graph, PruningPlan(PLAN))
    apply_plan(model, graph, PruningPlan(PLAN))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    skeleton.load_state_dict(model.state_dict(), assign=True)
    skeleton.model.rotary_emb = model.model.rotary_emb
    ids = token_ids(3, 9, seed=5)
    assert torch.equal(skeleton(input_ids=ids).logits, model(input_ids=ids).logits)


def test_weights_left_on_disk_are_refused(tmp_path):
    from accelerate import disk_offload

    model = tiny_llama()
    graph = trace(model, example())
    model.lm_head = disk_offload(model.lm_head, str(tmp_path))
    with pytest.raises(SurgeryError, match="meta device"):
        apply_plan(model, graph, PruningPlan(PLAN))
    assert model.model.layers[0].mlp.down_proj.in_features == 40


def test_weights_kept_on_the_host_are_cut_too():
    """Hooks that bring a layer's inputs to its device stay in place."""
    from accelerate import dispatch_model

    model = tiny_llama()
    graph = trace(model, example())
    masked = zero_units(copy.deepcopy(model), graph, PLAN)
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    apply_plan(model, graph, PruningPlan(PLAN))
    ids = token_ids(3, 9, seed=5)
    torch.testing.assert_close(
        model(input_ids=ids).logits, masked(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


def dispatched(model, other):
    """The model with its second layer on another device, all else on the first GPU."""
    from accelerate import dispatch_model

    places = {name: 0 for name, _ in model.model.named_children() if name != "layers"}
    places = {f"model.{name}": place for name, place in places.items()} | {"lm_head": 0}
    places |= {f"model.layers.{i}": other if i == 1 else 0 for i in range(3)}
    return dispatch_model(model, places, main_device=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are missing")
def test_layers_on_several_devices():
    model = tiny_llama()
    graph = trace(model, example())
    masked = zero_units(copy.deepcopy(model), graph, PLAN)
    model = dispatched(model, 1)
    apply_plan(model, graph, PruningPlan(PLAN))
    ids = token_ids(3, 9, seed=5)
    torch.testing.assert_close(
        model(input_ids=ids).logits.cpu(), masked(input_ids=ids).logits, rtol=1e-3, atol=1e-3
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is missing")
def test_layers_that_a_gpu_brings_from_the_host_are_refused():
    model = tiny_llama()
    graph = trace(model, example())
    with pytest.raises(SurgeryError, match="some weights are on the meta device"):
        apply_plan(dispatched(model, "cpu"), graph, PruningPlan(PLAN))


class Scaled(nn.Module):
    """Divides by an attribute that surgery brings in line, as if it were the width of a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.up, self.down, self.intermediate_size = nn.Linear(8, 12), nn.Linear(12, 8), 12
        self.places = [torch.arange(8.0)]  # tensors that are no buffers

    def forward(self, x):
        x = self.norm(self.stem(x))
        return (self.down(self.up(x).relu()) / self.intermediate_size).sum(-1)


def test_exact_groups_are_checked_beside_inexact_ones():
    model = randomise(Scaled())
    graph = trace(model, (torch.randn(2, 5),))
    mlp, channel = graph["mlp"], graph["other"]
    assert mlp.exact
    assert not channel.exact
    for removed in ({mlp.name: [0]}, {channel.name: [0], mlp.name: [0]}):
        with pytest.raises(SurgeryError, match=r"^mlp: the cut model's outputs differ"):
            apply_plan(model, graph, PruningPlan(removed))
    assert model.intermediate_size == 12
    apply_plan(model, graph, PruningPlan({channel.name: [0]}))


class Whispering(nn.Module):
    """Attention under a name of its own for the number of heads, on a branch too quiet for outputs
    to show it.
    """

    def __init__(self, loudness):
        super().__init__()
        self.h, self.recent, self.loudness = 4, 4, loudness
        self.q, self.k, self.v, self.out = (
            nn.Linear(24, 64),
            nn.Linear(24, 64),
            nn.Linear(24, 64),
            nn.Linear(64, 24),
        )
        self.head = nn.Linear(24, 11)

    def forward(self, x):
        x = x[:, -self.recent :]
        q, k, v = (
            layer(x).unflatten(-1, (self.h, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.head(x + self.loudness * self.out(mixed.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("loudness", "dtype"), [(1.0, torch.float32), (1e-6, torch.float32), (1e-3, torch.bfloat16)]
)
def test_heads_are_counted_where_their_numbers_are_too_small_to_see(loudness, dtype):
    model = Whispering(loudness).to(dtype).eval()
    graph = trace(model, (torch.randn(2, 3, 24, dtype=dtype),))
    apply_plan(model, graph, PruningPlan({"attention": [0, 2]}))
    assert model.h == 2
    assert model.recent == 4, "an equal number that nothing asks to change"


def test_units_are_counted_on_meta_too():
    model = Whispering(1.0).to("meta")
    graph = trace(model, (torch.randn(2, 3, 24),))
    apply_plan(model, graph, PruningPlan({"attention": [0, 2]}))
    assert (model.h, model.recent, model.q.weight.shape) == (2, 4, (32, 24))


class Literal(Whispering):
    """The number of heads stands in the code."""

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))


def test_heads_that_nothing_can_bring_in_line_are_refused_on_meta():
    model = Literal(1.0).to("meta")
    graph = trace(model, (torch.randn(2, 3, 24),))
    with pytest.raises(SurgeryError, match=r"attention: the cut model reads \[4"):
        apply_plan(model, graph, PruningPlan({"attention": [0, 2]}))
    assert model.q.weight.shape == (64, 24)


class Stateful(nn.Module):
    """Counts its calls, changes its input, has a part that is not trained."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        x.add_(1)
        return self.second(self.norm(self.first(x)).relu()), self.calls * 1.0


def test_checking_leaves_no_trace():
    model = Stateful().train()
    model.norm.eval()
    x = torch.randn(4, 5)
    before = x.clone()
    graph = trace(model, (x,))
    apply_plan(model, graph, PruningPlan({next(g.name for g in graph.groups if g.prunable): [0]}))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert model.calls == 0
    assert torch.equal(x, before)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(hidden * {8: 1.0}[hidden.shape[-1]])


def test_any_error_of_the_cut_model_is_a_refusal():
    model = Table()
    graph = trace(model, (torch.randn(4, 5),))
    with pytest.raises(SurgeryError, match="doesn't run: 7"):
        apply_plan(
            model, graph, PruningPlan({next(g.name for g in graph.groups if g.prunable): [0]})
        )
    assert model.first.weight.shape == (8, 5)


@pytest.mark.parametrize("at", range(1, 6))
def test_an_interruption_at_any_forward_pass_leaves_the_model_whole(at, monkeypatch):
    model = Whispering(1.0).eval()
    graph = trace(model, (torch.randn(2, 3, 24),))
    interrupt_run(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(model, graph, PruningPlan({"attention": [0, 2]}))
    assert (model.h, model.recent, model.q.weight.shape, model.q.out_features) == (
        4,
        4,
        (64, 24),
        64,
    )
