"""What the model demands of a cut: which groups may lose all of their units."""

import pytest
import torch
from conftest import example, tiny_llama, token_ids
from families import build_deep

import prunekit
from prunekit.allocation.limits import find_demands
from prunekit.allocation.scope import Scope
from prunekit.allocation.slots import make_slots
from prunekit.config.compose import check, compose
from prunekit.errors import ConfigError
from prunekit.graph import trace
from prunekit.schedules.method import Method
from prunekit.surgery import whole

LAST = ["policy=manual", "policy.values=[0,0,1]", "schedule.damping=0.01"]


def floors(model, graph, **scope):
    groups = [group for group in graph.groups if group.prunable and group.kind != "channel"]
    config = check(compose(["shapes=free"]))
    demands = find_demands(model, graph, groups, config, Scope(**scope))
    shares = {group.name: 1.0 for group in groups}
    slots = make_slots(Scope(**scope), groups, shares, demands)
    return {slot.name: slot.num_units - slot.removed[-1] for slot in slots}


def test_what_may_go_as_a_whole_goes_where_the_scope_lets_it():
    model = tiny_llama()
    graph = trace(model, example())
    assert set(floors(model, graph).values()) == {1}
    least = floors(model, graph, min_units=0)
    assert least["layers.1.self_attn"] == least["layers.2.mlp"] == 0
    assert least["layers.0.self_attn.query_head"] == 1
    least = floors(model, graph, min_units={"mlp": 0, "attention": 2})
    assert least["layers.1.self_attn"] == 2
    assert least["layers.1.mlp"] == 0


def test_experts_stay_as_many_as_a_token_is_sent_to():
    model = build_deep("mixtral")
    graph = trace(model, example())
    least = floors(model, graph, min_units=0)
    assert {least[group.name] for group in graph.groups if group.kind == "expert"} == {2}
    assert least["layers.0.mlp.experts"] == 0
    expected = r"min_units.expert: expected at least 2, got [01]: layers.0.mlp.*each token to 2"
    for number in (0, 1):
        with pytest.raises(ConfigError, match=expected):
            floors(model, graph, min_units={"expert": number})


@pytest.mark.parametrize(
    ("options", "least"),
    [
        (["policy=search"], 0),
        (["policy=uniform"], 1),
        (["policy=search", "scope.min_units=1"], 1),
        (["policy=uniform", "scope.min_units=0"], 0),
        (["policy=search", "scope.min_units={mlp: 3}"], {"mlp": 3}),
    ],
)
def test_the_policy_says_whether_groups_may_go_as_a_whole(options, least):
    assert Method.build(check(compose(options))).scope.min_units == least


def test_a_kind_that_can_not_go_is_refused_before_any_work():
    model = tiny_llama()
    graph = trace(model, example())
    expected = (
        r"scope.min_units.query_head: expected at least 1, got 0: layers.0.self_attn.query_head "
        "can't lose all of its units: its attention group is what can go as a whole"
    )
    with pytest.raises(ConfigError, match=expected):
        floors(model, graph, min_units={"query_head": 0})


def test_a_class_whose_layers_need_a_unit_is_found_out(monkeypatch):
    """All groups are tried at once, and one of each class where that fails."""
    model = tiny_llama()
    graph = trace(model, example())
    groups = [group for group in graph.groups if group.must_stay is None]
    tried = []

    def refuse(model, graph, plan):
        tried.append(set(plan.removed))
        if any(name.endswith("mlp") for name in plan.removed):
            raise prunekit.errors.SurgeryError("the cut model doesn't run")

    monkeypatch.setattr(whole, "apply_plan", refuse)
    reasons = whole.find_obstacles(model, graph, groups)
    assert reasons == {f"layers.{i}.mlp": "the cut model doesn't run" for i in range(3)}
    assert [len(names) for names in tried] == [6, 1, 1]


@pytest.mark.parametrize("method", ["slimgpt", "llm_pruner"])
def test_a_run_may_leave_a_layer_nothing(method, tmp_path):
    model = tiny_llama()
    graph = trace(model, example())
    layer = {
        g.name: list(range(g.num_units))
        for g in graph.groups
        if g.layer == 2 and g.kind in ("attention", "mlp")
    }
    ratio = graph.removed_parameters(layer) / graph.num_parameters()
    chosen = [*LAST, "scope.min_units=0", "shapes=free"]
    result = prunekit.prune(
        model, ratio=ratio, method=method, calibration=token_ids(8, 12), overrides=chosen
    )
    assert result.plan.removed == layer
    kept = result.report["layers"][-1]
    assert kept["attention"]["kept"] == kept["mlp"]["kept"] == 0
    assert result.report["ratio"]["achieved"] == pytest.approx(ratio, abs=1e-12)
    prunekit.save_pretrained(model, tmp_path / "model")
    again, ids = prunekit.from_pretrained(tmp_path / "model"), token_ids(2, 5)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_uniform_shapes_leave_a_unit_everywhere():
    model = tiny_llama()
    graph = trace(model, example())
    groups = [group for group in graph.groups if group.kind == "mlp"]
    config = check(compose(["shapes=uniform"]))
    demands = find_demands(model, graph, groups, config, Scope(min_units=0))
    (slot,) = make_slots(Scope(min_units=0), groups, {g.name: 1.0 for g in groups}, demands)
    assert slot.removed[-1] == 39
    with pytest.raises(ConfigError, match="can't lose all of its units: shapes=uniform"):
        find_demands(model, graph, groups, config, Scope(min_units={"mlp": 0}))
