import copy

import pytest
import torch
from conftest import example, inputs_of, tiny_llama, token_ids
from torch import nn

import prunekit
from prunekit import pipeline
from prunekit.calibration import walk as walking
from prunekit.errors import ConfigError, DataError, TraceError
from prunekit.graph import trace
from prunekit.importance import (
    Importance,
    Obs,
    PeakToPeak,
    TaylorFirst,
    Wanda,
)
from prunekit.schedules import State


def batches(ids, size=3):
    return [{"input_ids": chunk, "use_cache": False} for chunk in ids.split(size)]


def block(graph):
    return [group for group in graph.groups if group.kind in ("attention", "mlp")]


def walked(model, groups, given):
    for group, (site,) in walking.Walk(model=model, groups=groups, batches=given):
        yield group, site.consumers[0], site.moments


def test_each_group_sees_the_inputs_the_changed_prefix_gives():
    model = tiny_llama()
    graph = trace(model, example())
    ids = token_ids(7, 9)
    for group, consumer, moments in walked(model, block(graph), batches(ids)):
        x = inputs_of(model, consumer.name, ids)  # of the model as it now is
        torch.testing.assert_close(moments.hessian.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
        consumer.store(consumer.weight() * 0.5)
        assert group.layer is not None


def test_whole_model_passes_give_the_same_moments(monkeypatch):
    graph = trace(tiny_llama(), example())
    ids = token_ids(5, 8)

    def moments():
        model = tiny_llama()
        found = []
        for _, consumer, m in walked(model, block(graph), batches(ids)):
            found.append(m.hessian.clone())
            consumer.store(consumer.weight() * 0.5)
        return found

    streamed = moments()
    monkeypatch.setattr(walking.Stream, "open", classmethod(lambda *args: None))
    for left, right in zip(streamed, moments(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_padding_does_not_count():
    model = tiny_llama()
    graph = trace(model, example())
    group = [graph["layers.0.self_attn"]]
    ids = token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    padded = [{"input_ids": ids, "attention_mask": mask, "use_cache": False}]
    ((_, _, with_padding),) = walked(model, group, padded)
    parts = [
        {"input_ids": ids[:1, :5], "use_cache": False},
        {"input_ids": ids[1:], "use_cache": False},
    ]
    ((_, _, without),) = walked(model, group, parts)
    assert with_padding.tokens == without.tokens == 13
    torch.testing.assert_close(with_padding.hessian, without.hessian, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["slimgpt", "llm_pruner", "magnitude", "random"])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_methods_end_to_end(method, kv_heads):
    model = tiny_llama(kv_heads, layers=4)
    dense = sum(p.numel() for p in model.parameters())
    result = prunekit.prune(model, ratio=0.3, method=method, calibration=token_ids(8, 12))
    pruned = sum(p.numel() for p in model.parameters())
    assert result.report["parameters"] == {"dense": dense, "pruned": pruned}
    assert abs(1 - pruned / dense - 0.3) < 145 / dense
    assert result.report["ratio"]["achieved"] == pytest.approx(1 - pruned / dense)
    assert torch.isfinite(model(input_ids=token_ids()).logits).all()
    again = prunekit.prune(
        tiny_llama(kv_heads, layers=4), ratio=0.3, method=method, calibration=token_ids(8, 12)
    )
    assert again.plan == result.plan
    for left, right in zip(model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_compensation_brings_the_layers_output_nearer():
    errors = {}
    ids = token_ids(32, 16)
    for compensation in ("obs", "none"):
        model = tiny_llama(8)
        before = inputs_of(model, "lm_head", ids)
        prunekit.prune(
            model, ratio=0.3, calibration=ids, overrides=[f"compensation={compensation}"]
        )
        errors[compensation] = (inputs_of(model, "lm_head", ids) - before).square().mean().item()
    assert errors["obs"] < 0.8 * errors["none"]


def test_compensation_after_another_methods_choice():
    ids = token_ids(16, 12)
    plain, repaired = tiny_llama(), tiny_llama()
    one = prunekit.prune(plain, method="llm_pruner", calibration=ids)
    two = prunekit.prune(
        repaired, method="llm_pruner", calibration=ids, overrides=["compensation=obs"]
    )
    assert one.plan == two.plan
    assert not torch.equal(
        plain.model.layers[1].mlp.down_proj.weight, repaired.model.layers[1].mlp.down_proj.weight
    )


def test_obs_at_once_ranks_by_each_units_error_alone():
    """Against E(S) = min over the kept columns of ‖W X − W₁ X‖², by least squares in float64."""
    model = tiny_llama(layers=1)
    graph = trace(model, example())
    ids = token_ids(8, 20)
    for name, consumer in (("self_attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
        group = graph[f"layers.0.{name}"]
        x = inputs_of(model, f"model.layers.0.{consumer}", ids)
        weight = model.get_submodule(f"model.layers.0.{consumer}").weight.detach().double()
        scores = Obs(damping=0.0).score(model, graph, [group], batches(ids))[group.name]
        expected = []
        for unit in group.consumers[0].index:
            kept = [i for i in range(weight.shape[1]) if i not in unit.tolist()]
            solution = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution
            expected.append((x[:, kept] @ solution - x @ weight.T).square().sum() / len(x))
        torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-3, atol=1e-6)
    result = prunekit.prune(
        tiny_llama(), calibration=token_ids(8, 12), overrides=["schedule=oneshot"]
    )
    assert abs(result.report["ratio"]["achieved"] - 0.2) < 0.01


@pytest.mark.parametrize("where", ["weight", "activation"])
def test_nan_is_an_error_and_the_model_stays_as_it_was(where):
    model = tiny_llama()
    if where == "weight":
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
        match = r"layers\.1\.mlp\.up_proj\.weight.*NaN"
    else:
        model.model.layers[2].mlp.up_proj.weight.data.mul_(3e38)
        model.model.layers[2].mlp.up_proj.weight.data.clamp_(-3e38, 3e38)
        match = r"layers\.2\.mlp\.down_proj.*NaN or infinity"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DataError, match=match):
        prunekit.prune(model, calibration=token_ids())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_five_lines_that_are_no_language_model():
    net = nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    x = torch.randn(400, 10)
    dense = copy.deepcopy(net)
    result = prunekit.prune(
        net, ratio=0.5, method="slimgpt", calibration=[{"input": x}], overrides=["policy=uniform"]
    )
    assert result.report["ratio"]["achieved"] == pytest.approx(0.5, abs=0.02)
    plain = copy.deepcopy(dense)
    prunekit.prune(plain, ratio=0.5, method="random", calibration=[{"input": x}])
    assert (net(x) - dense(x)).square().mean() < 0.5 * (plain(x) - dense(x)).square().mean()


def test_it_is_said_where_no_step_is_small_enough(monkeypatch):
    said = []
    monkeypatch.setattr(pipeline, "say", said.append)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    x = [{"input": torch.randn(4, 4)}]
    result = prunekit.prune(net, ratio=0.1, method="random", calibration=x)
    assert not result.plan.removed
    assert said[-1].startswith("nothing was removed")
    prunekit.prune(net, ratio=0.3, method="random", calibration=x)
    assert net[0].out_features == 2
    assert len([line for line in said if line.startswith("nothing was removed")]) == 1


@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        (None, "got None"),
        (torch.randn(2, 3), "int64 token ids"),
        (torch.zeros(3, 1, dtype=torch.long), "T ≥ 2"),
        (torch.full((2, 5), 97), r"expected token ids in \[0, 97\), got 97 to 97"),
        ([{"input_ids": torch.full((2, 5), 97)}], r"expected token ids in \[0, 97\), got 97 to 97"),
        ([{"input_ids": torch.ones(2, 5).numpy()}], r"input_ids: expected a tensor, got numpy's"),
        (torch.ones(2, 65, dtype=torch.long), r"expected at most the 64 tokens .* got 65"),
        (torch.zeros(0, 5, dtype=torch.long), "int64 token ids"),
        ([], "at least one dict"),
        ([torch.zeros(1)], "at least one dict of keyword arguments, got a Tensor"),
    ],
)
def test_calibration_that_cannot_be_used(calibration, match):
    with pytest.raises(DataError, match=match):
        prunekit.prune(tiny_llama(), calibration=calibration)


def test_batches_that_would_keep_a_cache_give_the_same_plan():
    ids = token_ids(4, 12)
    one = prunekit.prune(
        tiny_llama(), calibration=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    )
    two = prunekit.prune(tiny_llama(), calibration=ids)
    assert one.plan == two.plan


def test_nothing_to_prune():
    with pytest.raises(TraceError, match="no parameters"):
        prunekit.prune(nn.ReLU(), calibration=[{"input": torch.randn(2, 3)}])


@pytest.mark.parametrize("schedule", ["oneshot", "layerwise"])
def test_an_importance_of_neither_kind_is_refused(schedule):
    class Neither(Importance):
        pass

    with pytest.raises(ConfigError, match=r"expected a subclass of ScoreImportance or LayerImp"):
        prunekit.prune(
            tiny_llama(), importance=Neither(), schedule=schedule, calibration=token_ids()
        )


@pytest.mark.parametrize("schedule", ["layerwise", "oneshot"])
def test_the_report_says_which_hessians_took_float64(schedule):
    """Fewer tokens than inputs make a Hessian singular; much damping makes it harmless."""
    few, many = token_ids(3, 10), token_ids(32, 30)
    options = [f"schedule={schedule}", "compensation.target=pruned", "importance=obs"]
    options = options if schedule == "layerwise" else [*options[:2], "importance=magnitude"]
    bare = [*options, "schedule.damping=0"]
    result = prunekit.prune(tiny_llama(), calibration=few, overrides=bare)
    cut = {name: 1 for name, units in result.plan.removed.items() if units}
    assert result.report["float64"] == cut
    calm = [*options, "schedule.damping=0.5"]
    result = prunekit.prune(tiny_llama(), calibration=many, overrides=calm)
    assert "float64" not in result.report


def test_a_resumed_run_knows_which_hessians_took_float64(monkeypatch, tmp_path):
    few, folder = token_ids(3, 10), tmp_path / "state"
    bare = ["schedule.damping=0"]
    whole = prunekit.prune(tiny_llama(), calibration=few, overrides=bare)
    record, names = State.record, []

    def interrupted(self, group, finished, consumers):
        if len(names) == 2:
            raise KeyboardInterrupt
        names.append(group)
        record(self, group, finished, consumers)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(State, "record", interrupted)
        prunekit.prune(tiny_llama(), calibration=few, state=folder, overrides=bare)
    resumed = prunekit.prune(
        tiny_llama(), calibration=few, state=folder, overrides=[*bare, "resume=true"]
    )
    assert resumed.report["float64"] == whole.report["float64"]
    assert set(names) <= set(resumed.report["float64"])


@pytest.mark.parametrize("importance", ["wanda", "peak_to_peak", "taylor_first"])
def test_units_are_scored_again_on_the_model_as_it_is_by_then(importance):
    """Against scores of the whole model, in which the groups before are masked."""
    from prunekit.surgery.masking import masked

    ids, options = token_ids(6, 9), ["schedule.rescore=true", "policy=uniform", "shapes=free"]
    model = tiny_llama().double()
    graph, dense, given = trace(model, example()), copy.deepcopy(model), batches(ids)
    plan = prunekit.prune(
        model,
        ratio=0.3,
        importance=importance,
        compensation=None,
        calibration=ids,
        overrides=[*options, "schedule=layerwise"],
    ).plan
    scorer = {
        "wanda": Wanda,
        "peak_to_peak": PeakToPeak,
        "taylor_first": TaylorFirst,
    }[importance]()
    gone, stale = {}, 0
    for group in block(graph):
        if not (units := plan.removed.get(group.name)):
            continue
        with masked(dense, graph, gone):
            scores = scorer.score(dense, graph, [group], given)[group.name]
        assert sorted(scores.argsort(stable=True)[: len(units)].tolist()) == sorted(units)
        first = scorer.score(dense, graph, [group], given)[group.name]
        stale += sorted(first.argsort(stable=True)[: len(units)].tolist()) != sorted(units)
        gone[group.name] = units
    assert stale, "a choice on the dense model would be another one"


def test_gates_are_not_scored_again():
    with pytest.raises(ConfigError, match=r"schedule\.rescore: expected an importance that scores"):
        prunekit.prune(
            tiny_llama(),
            ratio=0.2,
            importance="hard_concrete",
            calibration=token_ids(4, 8),
            overrides=["schedule.rescore=true"],
        )
