"""One contract for every importance × aggregation × policy × scope: a new one is a row here."""

import functools
import itertools

import pytest
import torch
from conftest import example, tiny_llama, token_ids, zero_consumers

import prunekit
from prunekit import config as cfg
from prunekit.graph import trace
from prunekit.importance import ScoreImportance
from prunekit.pipeline import allocate
from prunekit.schedules.method import Method
from prunekit.surgery import apply_plan

LAYERS_ONLY = ("alternate", "similarity")
IMPORTANCES = sorted(path.stem for path in (cfg.config_dir() / "importance").glob("*.yaml"))
POLICIES = sorted(path.stem for path in (cfg.config_dir() / "policy").glob("*.yaml"))
SCOPES = sorted(path.stem for path in (cfg.config_dir() / "scope").glob("*.yaml"))
AGGREGATIONS = ("sum", "mean", "max", "prod", "first", "last")
VALUES = {"manual": ["policy.values=[1,0.5,0,2]"], "single": ["policy.layer=1"]}


def overrides(importance, aggregation, policy, scope):
    chosen = [
        f"importance={importance}",
        f"policy={policy}",
        f"scope={scope}",
        *VALUES.get(policy, ()),
    ]
    if importance not in (*LAYERS_ONLY, "ablation"):
        chosen.append(f"importance.aggregation={aggregation}")
    return chosen


def run_on(model, chosen, ratio=0.2):
    return prunekit.prune(
        model, ratio=ratio, method="llm_pruner", calibration=token_ids(4, 8), overrides=chosen
    )


def run(chosen, groups="block", ratio=0.08):
    model = tiny_llama(kv_heads=2, layers=4)
    return model, run_on(model, [*chosen, f"groups={groups}"], ratio)


def check(chosen):
    model, result = run(chosen)
    dense = tiny_llama(kv_heads=2, layers=4)
    groups = [g for g in result.graph.groups if g.kind in ("attention", "mlp")]
    cheapest = min(group.parameters_per_unit for group in groups)
    removed = sum(p.numel() for p in dense.parameters()) - sum(
        p.numel() for p in model.parameters()
    )
    assert abs(removed - 0.08 * result.graph.num_parameters()) <= cheapest / 2 + 1e-6
    assert removed == result.graph.removed_parameters(result.plan.removed)
    zero_consumers(dense, result.graph, result.plan.removed)
    ids = token_ids(3, 10, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    return result


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_scores_have_the_right_shape_are_finite_and_repeat(importance):
    model = tiny_llama(kv_heads=2, layers=4)
    graph = trace(model, example())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = (
        list(graph.stacks)
        if importance in LAYERS_ONLY
        else [g for g in graph.groups if g.layer in (0, 2)]
    )
    groups = [g for g in groups if g.kind in ("attention", "mlp", "layer")]
    batches = [{"input_ids": ids, "use_cache": False} for ids in token_ids(4, 8).split(2)]
    backends = [
        cfg.build(
            cfg.check(cfg.compose(overrides(importance, how, "uniform", "local"))).importance,
            "importance",
        )
        for how in (AGGREGATIONS if importance not in (*LAYERS_ONLY, "ablation") else ("sum",))
    ]
    structures = backends[0].structures(model, graph, groups, batches)
    again = backends[0].score(model, graph, groups, batches)
    for backend, group in itertools.product(backends, groups):
        assert isinstance(backend, ScoreImportance)
        scores = backend.combine(group, structures[group.name])
        assert scores.shape == (group.num_units,)
        assert scores.dtype == torch.float64
        assert scores.isfinite().all()
        assert len(scores.unique()) > 1
        if backend is backends[0]:
            assert torch.equal(scores, again[group.name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


BLOCK_IMPORTANCES = [name for name in IMPORTANCES if name not in LAYERS_ONLY]


def combinations(importance):
    """(aggregation, policy, scope): every policy in every scope; every aggregation.

    Rounds score again and again: each importance goes through them with one policy, and one
    importance that takes no time with all of them; not an ablation, which would take a forward
    pass for each unit in each round.
    """
    for policy, scope in itertools.product(POLICIES, SCOPES):
        few_rounds = importance == "magnitude" or (policy == "uniform" and importance != "ablation")
        if scope != "iterative" or few_rounds:
            yield AGGREGATIONS[0], policy, scope
    for aggregation in AGGREGATIONS[1:]:
        yield aggregation, "uniform", "global"


@functools.cache
def section(name, *chosen):
    """One section of the configuration.

    Composing everything anew for every combination takes longer than scoring.
    """
    return getattr(cfg.check(cfg.compose(["method=llm_pruner", *chosen])), name)


def configure(importance, aggregation, policy, scope):
    whole = overrides(importance, aggregation, policy, scope)
    return cfg.RunConfig(
        ratio=0.08,
        importance=section("importance", *(o for o in whole if o.startswith("importance"))),
        policy=section("policy", *(o for o in whole if o.startswith("policy"))),
        scope=section("scope", f"scope={scope}"),
        schedule=section("schedule"),
    )


def score_once(monkeypatch, importance):
    """Hand the scores of the dense model, computed once, to every policy and scope."""
    known = {}
    compute = importance.structures

    def remember(self, model, graph, groups, batches):
        names = tuple(group.name for group in groups)
        if names not in known:
            known[names] = compute(self, model, graph, groups, batches)
        return {name: structures.clone() for name, structures in known[names].items()}

    monkeypatch.setattr(importance, "structures", remember)


@pytest.mark.parametrize("importance", BLOCK_IMPORTANCES)
def test_every_combination_plans_within_its_budget_and_leaves_the_model_alone(importance):
    model = tiny_llama(kv_heads=2, layers=4)
    graph = trace(model, example())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [{"input_ids": token_ids(3, 7), "use_cache": False}]
    cheapest = min(g.parameters_per_unit for g in graph.groups if g.kind == "mlp")

    def check_plan(*chosen):
        config = configure(importance, *chosen)
        method = Method.build(config)
        plan = method.schedule.run(allocate(model, graph, config, method, batches).assignment)
        plan.check(graph)
        off = abs(graph.removed_parameters(plan.removed) - 0.08 * graph.num_parameters())
        assert off <= cheapest / 2 + 1e-6, chosen

    chosen = [*combinations(importance)]
    backend = Method.build(configure(importance, *chosen[0])).importance
    with pytest.MonkeyPatch.context() as patch:
        score_once(patch, type(backend))
        for aggregation, policy, scope in chosen:
            if scope != "iterative":
                check_plan(aggregation, policy, scope)
    for aggregation, policy, scope in chosen:
        if scope == "iterative":
            check_plan(aggregation, policy, scope)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("importance", BLOCK_IMPORTANCES)
def test_what_is_cut_equals_the_masked_model(importance):
    i = BLOCK_IMPORTANCES.index(importance)
    check(
        overrides(
            importance, AGGREGATIONS[i % 6], POLICIES[i % len(POLICIES)], SCOPES[i % len(SCOPES)]
        )
    )


@pytest.mark.parametrize("importance", ["random", "taylor_second", "lora_gradient"])
def test_the_same_seed_gives_the_same_plan(importance):
    chosen = overrides(importance, "sum", "log_increase", "global")
    assert run(chosen)[1].plan == run(chosen)[1].plan


@pytest.mark.parametrize(
    "importance", [*LAYERS_ONLY, "ablation", "taylor_second", "magnitude", "wanda", "random"]
)
def test_whole_layers_by_every_importance_that_knows_them(importance):
    model, result = run([f"importance={importance}", "policy=uniform"], groups="layer", ratio=0.4)
    assert (
        len(model.model.layers)
        == model.config.num_hidden_layers
        == 4 - len(result.plan.removed["layers"])
        == 2
    )
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    again = tiny_llama(kv_heads=2, layers=4)
    apply_plan(again, result.graph, result.plan)
    ids = token_ids(2, 6)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    if importance == "alternate":
        assert result.plan.removed["layers"] == [1, 3]


def test_patterns_protect_single_layers():
    _, result = run(
        ["importance=magnitude", "policy=uniform", "scope.exclude=[layers.0,layers.3]"],
        "layer",
        0.4,
    )
    assert result.plan.removed["layers"] == [1, 2]


@pytest.mark.parametrize(
    "groups", ["channel", "head_dim", "query_head", "[attention,channel]", "[block,layer]"]
)
def test_other_kinds_of_groups(groups):
    model, result = run(["importance=taylor_first", "policy=uniform"], groups, 0.15)
    assert result.report["parameters"]["pruned"] == sum(p.numel() for p in model.parameters())
    assert abs(result.report["ratio"]["achieved"] - 0.15) < 0.09  # half of the dearest single unit
    assert model.generate(token_ids(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


@pytest.mark.parametrize(
    ("target", "measure"),
    [("parameters=40000", "parameters"), ("bytes=160000", "bytes"), ("flops=6e6", "flops")],
)
def test_targets(target, measure):
    model, result = run([f"target.{target}", "importance=magnitude", "policy=log_increase"])
    found = result.report["target"]
    assert found["measure"] == measure
    assert found["achieved"] == pytest.approx(found["limit"], rel=0.01)
    if measure != "flops":
        assert found["achieved"] == sum(p.numel() for p in model.parameters()) * (
            4 if measure == "bytes" else 1
        )


def test_compensation_repairs_any_selection():
    ids = token_ids(16, 20)

    def error(*more):
        dense, model = tiny_llama(layers=2), tiny_llama(layers=2)
        prunekit.prune(
            model,
            method="llm_pruner",
            ratio=0.15,
            calibration=ids,
            overrides=["policy=uniform", *more],
        )
        with torch.no_grad():
            return (dense(ids).logits - model(ids).logits).square().mean().item()

    plain = error("importance=fluctuation")
    assert error("importance=fluctuation", "compensation=obs") < plain
    assert error("importance=fluctuation", "compensation=bias") < plain


def test_each_matrix_by_itself_is_an_ablation_that_hurts():
    ids = token_ids(16, 20)
    errors = []
    for groups in ("block", "independent"):
        model, dense = tiny_llama(layers=2), tiny_llama(layers=2)
        chosen = ["importance=magnitude", "policy=uniform", f"groups={groups}"]
        result = prunekit.prune(
            model, method="llm_pruner", ratio=0.3, calibration=ids, overrides=chosen
        )
        assert model.model.layers[0].mlp.gate_proj.out_features < 40
        with torch.no_grad():
            errors.append((dense(ids).logits - model(ids).logits).square().mean().item())
    assert errors[1] > 1.2 * errors[0]
    # each matrix keeps its own best rows
    dense, gate = (
        tiny_llama(layers=2).model.layers[0].mlp.gate_proj,
        model.model.layers[0].mlp.gate_proj,
    )
    norms = dense.weight.detach().square().sum(1) + dense.bias.detach().square()
    kept = norms.argsort()[len(result.plan.removed["layers.0.mlp"]) :].sort().values
    assert torch.equal(gate.weight, dense.weight[kept])
    with pytest.raises(prunekit.PrunekitError, match="compensation=none"):
        run(["importance=magnitude", "compensation=obs"], "independent")


def test_a_failure_midway_leaves_the_model_as_it_was(monkeypatch):
    for chosen in (["groups=independent"], ["importance=fluctuation", "compensation=bias"]):
        model = tiny_llama(layers=3, kv_heads=2)
        model.model.layers[1].mlp.down_proj.bias = None
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        monkeypatch.setattr(
            "prunekit.pipeline.apply_plan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            prunekit.prune(
                model,
                method="llm_pruner",
                calibration=token_ids(4, 8),
                overrides=["policy=uniform", *chosen],
            )
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_bias_that_its_class_lacks_is_saved_and_loaded(tmp_path):
    model = tiny_llama(layers=3)
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = None
    chosen = ["importance=fluctuation", "compensation=bias", "policy=uniform", "groups=mlp"]
    result = prunekit.prune(
        model, method="llm_pruner", ratio=0.2, calibration=token_ids(4, 8), overrides=chosen
    )
    assert result.report["parameters"]["pruned"] == sum(p.numel() for p in model.parameters())
    assert abs(result.report["ratio"]["achieved"] - 0.2) < 0.002
    assert len(model.config.extra_biases) == 3


def test_layers_beside_other_cuts_of_a_model_without_biases():
    """What is dropped takes its names with it; nothing is looked up by them afterwards."""
    for chosen in (["groups=[mlp,layer]"], ["groups=[layer,attention]", "scope=iterative"]):
        model = tiny_llama(layers=4)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.bias = None
        before = sum(p.numel() for p in model.parameters())
        result = run_on(model, ["importance=magnitude", "policy=uniform", *chosen], 0.35)
        assert len(model.model.layers) == 4 - len(result.plan.removed["layers"])
        assert len(result.plan.removed) > 1
        assert (
            result.report["parameters"]["pruned"]
            == sum(p.numel() for p in model.parameters())
            < before
        )
        assert getattr(model.config, "extra_biases", None) is None


def test_sensitivity_takes_nothing_for_free():
    """A twentieth of two heads is no head: its error is zero and so is what it saves."""
    _, result = run(
        [
            "importance=magnitude",
            "policy=sensitivity",
            "policy.ratios=[0.05,0.5]",
            "policy.by=group",
        ]
    )
    notes = result.report["policy"]
    heads = [name for name in notes["shares"] if "self_attn" in name]
    assert all(notes["sensitivity"]["errors"][name][0] == 0 for name in heads)
    assert all(notes["shares"][name] != pytest.approx(0.05) for name in heads)


def test_losses_of_the_models_own_are_traced():
    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 32), torch.nn.Linear(32, 4)

        def forward(self, x, y):
            out = self.b(self.a(x).relu())
            return {"loss": torch.nn.functional.mse_loss(out, y), "out": out}

    batches = [{"x": torch.randn(8, 8), "y": torch.randn(8, 4)}]
    for importance in ("taylor_first", "taylor_second", "lora_gradient", "wanda", "fluctuation"):
        chosen = ["policy=uniform", f"importance={importance}"]
        net = Regression()
        prunekit.prune(net, ratio=0.3, method="llm_pruner", calibration=batches, overrides=chosen)
        assert net.a.out_features == 22
    ids = token_ids(4, 8)
    model = tiny_llama(layers=2)
    chosen = ["policy=uniform", "importance=magnitude"]
    prunekit.prune(
        model,
        method="llm_pruner",
        calibration=[{"input_ids": ids, "labels": ids}],
        overrides=chosen,
    )
    assert model.model.layers[0].mlp.gate_proj.out_features < 40


def test_bad_input():
    for chosen, match in (
        (
            ["policy=manual", "policy.values=[1,2]"],
            r"policy.values: expected 4 numbers, one a layer, got 2",
        ),
        (
            ["scope.exclude=['layers.1.mpl']"],
            r"'layers.1.mpl' matches nothing: did you mean layers.1.mlp",
        ),
        (["scope.min_units=39"], r"out of reach.* \(scope.min_units=39\)"),
        (["scope.min_units={mpl: 4}"], "scope.min_units: unknown kind 'mpl': did you mean mlp"),
        (
            ["target.parameters=1e9"],
            "target.parameters: expected less than the dense model's 56,816 parameters",
        ),
        (["target.flops=1e3"], r"target.flops: 1,000 of .* flops is out of reach.*leaves"),
        (["policy=manual", "policy.values=shares.csv"], "a file is policy.path"),
        (["target.flops=1e6", "target.bytes=10"], "expected one of"),
        (["memory.stream=1"], "memory.stream: expected true, false or auto, got 1"),
        (["memory.budget=nan"], "memory.budget: expected a number of bytes ≥ 0"),
        (
            ["compensation=obs", "compensation.bias=maybe"],
            "compensation.bias: expected true or false",
        ),
        (["schedule.damping=inf"], "schedule.damping: expected a number"),
        (["importance.aggregation=avg"], "importance.aggregation: unknown 'avg'"),
        (["importance.normalisation=mena"], "did you mean mean"),
        (["importance=similarity"], "scores whole layers"),
        (
            ["policy=sensitivity", "policy.ratios=[2]"],
            r"policy.ratios: expected numbers in \(0, 1\)",
        ),
    ):
        with pytest.raises(prunekit.PrunekitError, match=match) as caught:
            run(chosen, ratio=0.3)
        assert "\n" not in str(caught.value)
    with pytest.raises(
        prunekit.PrunekitError, match=r"compensation=obs: layers.* found none \(layer\)"
    ):
        run(["compensation=obs", "policy=uniform"], "layer")
    for calibration, match in (
        ([{"input_ids": token_ids(2, 1)}], "not a single token to predict"),
        (
            [{"input_ids": token_ids(2, 4), "attention_mask": torch.zeros(2, 4)}],
            "not a single token to predict",
        ),
    ):
        with pytest.raises(prunekit.PrunekitError, match=match):
            prunekit.prune(
                tiny_llama(),
                method="llm_pruner",
                calibration=calibration,
                overrides=["policy=uniform"],
            )
