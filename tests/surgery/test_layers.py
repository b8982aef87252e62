"""Whole decoder layers as units: dropped equals passed over, and everything that counts layers
follows.
"""

import copy
import json

import pytest
import torch
from conftest import example, interrupt_run, randomise, tiny_llama, token_ids, zero_units
from families import DEEP, MORE, alternate, build_deep, layers_of
from sharing import trace_anew
from torch import nn
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.errors import CheckpointError, SurgeryError, TraceError
from prunekit.surgery import check
from prunekit.surgery.masking import masked as masking


def ask(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def passed_over(model, path, dropped):
    """An independent mask: layers whose forward gives back what it was given."""
    model = copy.deepcopy(model)
    for index in dropped:
        layer = model.get_submodule(path)[index]
        forward = layer.forward

        def same(hidden, *args, forward=forward, **kwargs):
            output = forward(hidden.clone(), *args, **kwargs)
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        layer.forward = same
    return model


def generated(model, *ids, **kwargs):
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    return model.generate(*ids, **settings, **kwargs)


@pytest.mark.parametrize(("family", "attention"), alternate(DEEP))
def test_dropped_equals_passed_over(family, attention, tmp_path):
    model = build_deep(family, attention)
    number = layers_of(family)
    graph = prunekit.trace(model, example())
    (stack,) = graph.stacks
    assert (stack.kind, stack.num_units, stack.prunable, stack.members) == (
        "layer",
        number,
        True,
        (),
    )
    assert stack not in graph.groups
    assert graph[stack.name] is stack
    removed = {stack.name: [0, 3]}
    expected = passed_over(model, stack.module, [0, 3])
    before = model.num_parameters()
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    assert before - model.num_parameters() == graph.removed_parameters(removed)
    assert len(model.get_submodule(stack.module)) == model.config.num_hidden_layers == number - 2
    ids = token_ids(3, 9, seed=2)
    logits = ask(model, ids, use_cache=False)
    torch.testing.assert_close(logits, ask(expected, ids, use_cache=False), rtol=1e-4, atol=1e-4)
    text = generated(model, ids[:1], use_cache=False)
    assert torch.equal(generated(model, ids[:1]), text)
    assert torch.equal(generated(expected, ids[:1], use_cache=False), text)

    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(tmp_path / "model", attn_implementation=attention)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation=attention)
    for loaded in map(
        copy.deepcopy, (again, stock)
    ):  # a file's tensors lie less aligned in memory, which may round
        assert torch.equal(ask(loaded, ids, use_cache=False), logits)
        assert torch.equal(generated(loaded, ids[:1]), text)
    assert "per_layer_config" not in json.loads((tmp_path / "model" / "config.json").read_text())


def plan_beside(graph, stack, dropped):
    """Heads and FFN channels of every layer, of dropped ones too; other numbers in every layer."""
    kinds = {
        "attention": lambda g: [0],
        "mlp": lambda g: list(range(12 if g.layer == 3 else 4)),
        "query_head": lambda g: [0],
    }
    wanted = [
        g for g in graph.groups if g.kind in kinds and g.prunable and g.exact and g.layer != 1
    ]
    return {stack.name: dropped} | {group.name: kinds[group.kind](group) for group in wanted}


@pytest.mark.parametrize(("family", "attention"), alternate({**MORE, **dict.fromkeys(DEEP[::4])}))
def test_layers_with_heads_and_channels(family, attention, tmp_path):
    model = build_deep(family, attention)
    graph = prunekit.trace(model, example())
    (stack,) = graph.stacks
    removed = plan_beside(graph, stack, [1, 2])
    others = {name: units for name, units in removed.items() if name != stack.name}
    expected = zero_units(passed_over(model, stack.module, [1, 2]), graph, others)
    before = model.num_parameters()
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    assert before - model.num_parameters() == graph.removed_parameters(removed)
    ids = token_ids(3, 9, seed=2)
    logits = ask(model, ids, use_cache=False)
    torch.testing.assert_close(logits, ask(expected, ids, use_cache=False), rtol=1e-3, atol=1e-3)
    assert torch.equal(generated(model, ids[:1]), generated(model, ids[:1], use_cache=False))
    prunekit.save_pretrained(model, tmp_path / "model")
    again = prunekit.from_pretrained(
        tmp_path / "model", attn_implementation=model.config._attn_implementation
    )
    again = copy.deepcopy(again)
    assert torch.equal(ask(again, ids, use_cache=False), logits)
    assert torch.equal(generated(again, ids[:1]), generated(model, ids[:1]))


def test_steps_in_any_order_give_one_model(tmp_path):
    """Layers after widths, widths after layers, both at once; with a checkpoint in between."""
    removed = {"layers.0.mlp": [1, 4], "layers.3.self_attn": [2], "layers.2.mlp": [0]}
    one, two, three = (tiny_llama(layers=4) for _ in range(3))
    graph = prunekit.trace(one, example())
    prunekit.apply_plan(one, graph, prunekit.PruningPlan({**removed, "layers": [1, 2]}))
    prunekit.apply_plan(two, graph, prunekit.PruningPlan(removed))
    prunekit.save_pretrained(two, tmp_path / "two")
    two = prunekit.from_pretrained(tmp_path / "two")
    prunekit.apply_plan(
        two, prunekit.trace(two, example()), prunekit.PruningPlan({"layers": [1, 2]})
    )
    prunekit.apply_plan(three, graph, prunekit.PruningPlan({"layers": [1, 2]}))
    later = {"layers.0.mlp": [1, 4], "layers.1.self_attn": [2]}
    prunekit.apply_plan(three, prunekit.trace(three, example()), prunekit.PruningPlan(later))
    ids = token_ids(3, 9, seed=5)
    for other in (two, three):
        assert torch.equal(ask(other, ids), ask(one, ids))
        assert (
            other.config.to_dict()["per_layer_config"] == one.config.to_dict()["per_layer_config"]
        )
    assert one.config.to_dict()["per_layer_config"].keys() == {"0", "1"}
    assert [layer.self_attn.layer_idx for layer in one.model.layers] == [0, 1]


def test_where_only_dropped_layers_differed_the_model_is_ordinary_again(tmp_path):
    model = tiny_llama(layers=4)
    prunekit.apply_plan(
        model, prunekit.trace(model, example()), prunekit.PruningPlan({"layers.1.mlp": [3]})
    )
    assert model.config.is_heterogeneous
    prunekit.apply_plan(
        model, prunekit.trace(model, example()), prunekit.PruningPlan({"layers": [1]})
    )
    assert not model.config.is_heterogeneous
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    prunekit.save_pretrained(model, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(ask(stock, token_ids()), ask(model, token_ids()))


def test_down_to_one_layer():
    model = tiny_llama()
    expected = passed_over(model, "model.layers", [0, 1])
    prunekit.apply_plan(
        model, prunekit.trace(model, example()), prunekit.PruningPlan({"layers": [0, 1]})
    )
    torch.testing.assert_close(
        ask(model, token_ids()), ask(expected, token_ids()), rtol=1e-4, atol=1e-4
    )
    assert prunekit.trace(model, example()).stacks == ()


@pytest.mark.parametrize(
    ("removed", "match"),
    [
        ({"layers": [0, 1, 2]}, "layers: at least one of 3 units must stay"),
        ({"layers": [3]}, r"layers: units must lie in \[0, 3\), got 3 to 3"),
        ({"layers": [-1]}, r"layers: units must lie in \[0, 3\), got -1 to -1"),
        ({"layer": [0]}, "no group is called 'layer': did you mean layers "),
    ],
)
def test_plans_that_do_not_fit(removed, match):
    model = tiny_llama()
    with pytest.raises(TraceError, match=match):
        prunekit.apply_plan(model, prunekit.trace(model, example()), prunekit.PruningPlan(removed))


def test_a_plan_of_layers_goes_through_json():
    graph = prunekit.trace(tiny_llama(), example())
    plan = prunekit.PruningPlan({"layers": [2, 0], "layers.1.mlp": [3]}, graph.fingerprint)
    again = prunekit.PruningPlan.from_json(plan.to_json())
    again.check(graph)
    assert again.removed == {"layers": [0, 2], "layers.1.mlp": [3]}


def snapshot(model):
    """Everything a cut touches: attributes, names, addresses and configs."""
    plain = {
        p: {k: v for k, v in vars(m).items() if type(v) in (int, float, str)}
        for p, m in model.named_modules()
    }
    configs = {
        path: id(module.config)
        for path, module in model.named_modules()
        if "config" in vars(module)
    }
    return (
        plain,
        {n: p.data_ptr() for n, p in model.named_parameters()},
        model.config.to_dict(),
        configs,
    )


@pytest.mark.parametrize("at", range(1, 3))
def test_an_interruption_leaves_the_model_whole(at, monkeypatch):
    model = build_deep("gemma3_text")
    graph = prunekit.trace(model, example())
    before, logits = snapshot(model), ask(model, token_ids())
    interrupt_run(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        prunekit.apply_plan(
            model, graph, prunekit.PruningPlan({"layers": [1], "layers.0.mlp": [2]})
        )
    assert snapshot(model) == before
    assert torch.equal(ask(model, token_ids()), logits)


def test_a_failed_cut_leaves_the_model_whole(monkeypatch):
    model = build_deep("cohere2")
    graph = prunekit.trace(model, example())
    before = snapshot(model)
    monkeypatch.setattr(check, "compare_outputs", lambda *args: check.Fault(text="differs"))
    with pytest.raises(SurgeryError, match="layers: differs; the model was put back"):
        prunekit.apply_plan(
            model, graph, prunekit.PruningPlan({"layers": [1, 4], "layers.0.mlp": [1]})
        )
    assert snapshot(model) == before


def test_masking_passes_layers_over_and_stops():
    model = tiny_llama()
    graph = prunekit.trace(model, example())
    logits = ask(model, token_ids())
    with masking(model, graph, {"layers": [1], "layers.0.mlp": [2]}):
        masked = ask(model, token_ids())
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
    expected = zero_units(passed_over(model, "model.layers", [1]), graph, {"layers.0.mlp": [2]})
    assert torch.equal(masked, ask(expected, token_ids()))
    assert torch.equal(ask(model, token_ids()), logits)
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_units_of_dropped_layers_do_not_count_twice():
    model = tiny_llama(tied=True)
    graph = prunekit.trace(model, example())
    (stack,) = graph.stacks
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert stack.parameters_per_unit == layer == graph.removed_parameters({"layers": [0]})
    assert (
        graph.removed_parameters({"layers": [0], "layers.0.mlp": [1, 2], "layers.0.self_attn": [0]})
        == layer
    )
    channel = next(group.name for group in graph.groups if group.kind == "channel")
    removed = {"layers": [0], channel: [5]}
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    assert graph.num_parameters() - model.num_parameters() == graph.removed_parameters(removed)


def test_scales_that_follow_from_the_index_stay_and_are_not_saved(tmp_path):
    model = build_deep("gpt2", scale_attn_by_inverse_layer_idx=True)
    expected = passed_over(model, "transformer.h", [1])
    prunekit.apply_plan(model, prunekit.trace(model, example()), prunekit.PruningPlan({"h": [1]}))
    torch.testing.assert_close(
        ask(model, token_ids()), ask(expected, token_ids()), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(CheckpointError, match="scaling"):
        prunekit.save_pretrained(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


class Stack(nn.Module):
    """Linear layers with a residual, run as `how` says."""

    def __init__(self, how, sizes=(6, 6, 6)):
        super().__init__()
        self.how, self.num_layers = how, len(sizes)
        self.layers = nn.ModuleList(size and nn.Linear(6, size) for size in sizes)
        if how == "shared":
            self.layers[2] = self.layers[0]
        if how == "weights":
            self.layers[2].weight = self.layers[0].weight
        self.head = nn.Linear(sizes[-1] or 6, 3)

    def forward(self, x):
        if self.how == "parallel":
            return self.head(sum(layer(x) for layer in self.layers))
        order = reversed(self.layers) if self.how == "backwards" else self.layers
        for index, layer in enumerate(filter(None, order)):
            x = layer(x) * (index + 1 if self.how == "scaled" else 1)
        return self.head(x) * (self.num_layers if self.how == "counted" else 1)


@pytest.mark.parametrize(
    ("how", "sizes", "reason"),
    [
        ("parallel", (6, 6, 6), "side by side"),
        ("backwards", (6, 6, 6), "one after another"),
        ("shared", (6, 6, 6), "one after another"),
        ("chain", (6, 6, 8), "another could take"),
        ("chain", (6, None), "entries of its list are None"),
    ],
)
def test_lists_that_are_no_stacks(how, sizes, reason):
    graph = prunekit.trace(randomise(Stack(how, sizes)), (torch.randn(2, 6),))
    (stack,) = graph.stacks
    assert not stack.prunable
    assert not stack.exact
    assert reason in stack.reason
    with pytest.raises(TraceError, match=f"layers: not prunable: .*{reason}"):
        prunekit.PruningPlan({"layers": [0]}).check(graph)


def test_layers_that_name_other_layers_are_refused():
    model = randomise(Stack("chain"))
    for layer, source in zip(model.layers, (0, 0, 1), strict=True):
        layer.source_layer_index = source
    graph = prunekit.trace(model, (torch.randn(2, 6),))
    assert graph["layers"].reason == "its layers hold indices of other layers (source_layer_index)"
    for number, layer in enumerate(model.layers, 1):
        layer.source_layer_index = number
    prunekit.apply_plan(
        model, prunekit.trace(model, (torch.randn(2, 6),)), prunekit.PruningPlan({"layers": [0]})
    )
    assert [layer.source_layer_index for layer in model.layers] == [1, 2]


def test_a_config_that_counts_otherwise_is_refused():
    model = tiny_llama()
    model.config.num_hidden_layers = 2
    assert "counts 2 layers" in prunekit.trace(model, example())["layers"].reason


def test_an_encoder_and_a_decoder_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 50,
    }
    model = randomise(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)))
    graph = prunekit.trace(
        model, {"input_ids": token_ids(2, 7, 50), "decoder_input_ids": token_ids(2, 5, 50)}
    )
    assert [stack.name for stack in graph.stacks] == [
        "encoder.block.layer",
        "decoder.block.layer",
    ]  # heads have the short names
    assert all("encoder and a decoder" in stack.reason for stack in graph.stacks)


class Gap(nn.Module):
    """FFNs, and None for a layer that has none."""

    def __init__(self):
        super().__init__()
        ffn = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6))
        self.layers = nn.ModuleList([ffn, None, copy.deepcopy(ffn)])

    def forward(self, x):
        for layer in filter(None, self.layers):
            x = x + layer(x)
        return x


def test_a_list_with_gaps_is_cut_inside_its_layers():
    model, x = randomise(Gap(), 0.3), torch.randn(8, 6)
    dense = copy.deepcopy(model)
    result = prunekit.prune(
        model, ratio=0.3, calibration=[{"x": x}], policy="uniform", compensation=None
    )
    assert set(result.plan.removed) == {"layers.0", "layers.2"}
    zero_units(dense, result.graph, result.plan.removed)
    torch.testing.assert_close(model(x), dense(x))


def test_any_module_with_layers():
    model = randomise(Stack("chain"))
    graph = prunekit.trace(model, (torch.randn(2, 6),))
    x = torch.randn(3, 6)
    expected = model.head(model.layers[2](model.layers[0](x)))
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({"layers": [1]}))
    torch.testing.assert_close(model(x), expected)
    assert model.num_layers == 2


@pytest.mark.parametrize("how", ["scaled", "counted"])
def test_a_model_that_counts_its_layers_is_refused(how):
    model = randomise(Stack(how))
    graph = prunekit.trace(model, (torch.randn(2, 6),))
    before = model(torch.ones(2, 6))
    with pytest.raises(SurgeryError, match=r"^layers: .*differ"):
        prunekit.apply_plan(model, graph, prunekit.PruningPlan({"layers": [1]}))
    assert torch.equal(model(torch.ones(2, 6)), before)
    assert (len(model.layers), model.num_layers) == (3, 3)


def test_weights_shared_by_layers_go_with_the_last_of_them():
    model = randomise(Stack("weights"))
    graph = prunekit.trace(model, (torch.randn(2, 6),))
    assert graph.removed_parameters({"layers": [0]}) == 6
    assert graph.removed_parameters({"layers": [0, 2]}) == 6 + 36 + 6
    assert graph.stacks[0].parameters_per_unit == (6 + 42 + 6) // 3
    for removed in ([0], [0, 2]):
        pruned = copy.deepcopy(model)
        prunekit.apply_plan(pruned, graph, prunekit.PruningPlan({"layers": removed}))
        gone = graph.num_parameters() - sum(p.numel() for p in pruned.parameters())
        assert gone == graph.removed_parameters({"layers": removed})


def test_adapters_and_device_hooks_go_with_their_layers():
    from accelerate import dispatch_model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = randomise(get_peft_model(tiny_llama(layers=4), settings))
    hooked = tiny_llama(layers=4)
    graphs = [prunekit.trace(model, example()) for model in (wrapped, hooked)]
    hooked = dispatch_model(hooked, {"": "cpu"}, force_hooks=True)
    ids = token_ids(3, 9, seed=5)
    for model, graph in zip((wrapped, hooked), graphs, strict=True):
        removed = {"layers": [1], "layers.0.mlp": [2]}
        with masking(model, graph, removed):
            expected = ask(model, ids)
        prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
        torch.testing.assert_close(ask(model, ids), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(
            generated(model, input_ids=ids[:1]),
            generated(model, input_ids=ids[:1], use_cache=False),
        )
    merged = wrapped.merge_and_unload()
    assert len(merged.model.layers) == merged.config.num_hidden_layers == 3


def test_on_meta():
    skeleton = tiny_llama().to("meta")
    prunekit.apply_plan(
        skeleton, prunekit.trace(skeleton, example()), prunekit.PruningPlan({"layers": [1]})
    )
    model = tiny_llama()
    prunekit.apply_plan(
        model, prunekit.trace(model, example()), prunekit.PruningPlan({"layers": [1]})
    )
    skeleton.load_state_dict(model.state_dict(), assign=True)
    skeleton.model.rotary_emb = model.model.rotary_emb
    assert torch.equal(ask(skeleton, token_ids()), ask(model, token_ids()))


def test_torch_pruning_has_no_such_groups():
    model = tiny_llama()
    with pytest.raises(TraceError, match="layers: torch-pruning cuts channels"):
        prunekit.trace(model, example())["layers"].to_torch_pruning(model)


def test_the_fingerprint_is_that_of_the_other_groups():
    model = tiny_llama()
    graph = prunekit.trace(model, example())
    assert graph.fingerprint == trace_anew(tiny_llama(), example()).fingerprint
    assert graph.fingerprint != prunekit.trace(tiny_llama(layers=4), example()).fingerprint
