"""The contract of importances, with every aggregation, policy and scope.

A new importance is a module, a YAML in conf/importance, and so a row here.
"""

import functools
import itertools

import pytest
import torch
from conftest import example, tiny_llama, token_ids, zero_consumers
from contracts import (
    AGGREGATIONS,
    EXPERTS_ONLY,
    IMPORTANCES,
    LAYERS_ONLY,
    POLICIES,
    SCOPES,
    WHOLE,
    overrides,
    run,
)
from families import build_deep

from prunekit import config as cfg
from prunekit.graph import trace
from prunekit.importance import ScoreImportance
from prunekit.importance.base import Measured
from prunekit.pipeline import allocate
from prunekit.schedules.method import Method
from prunekit.surgery import apply_plan


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
    mixture = importance in EXPERTS_ONLY
    model = build_deep("mixtral") if mixture else tiny_llama(kv_heads=2, layers=4)
    graph = trace(model, example())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = (
        list(graph.stacks)
        if importance in LAYERS_ONLY
        else [g for g in graph.groups if g.layer in (0, 2)]
    )
    kinds = ("expert",) if mixture else ("attention", "mlp", "layer")
    groups = [g for g in groups if g.kind in kinds]
    batches = [{"input_ids": ids, "use_cache": False} for ids in token_ids(4, 8).split(2)]
    backends = [
        cfg.build(configure(importance, how, "uniform", "local").importance, "importance")
        for how in (AGGREGATIONS if importance not in WHOLE else ("sum",))
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


BLOCK_IMPORTANCES = [name for name in IMPORTANCES if name not in (*LAYERS_ONLY, *EXPERTS_ONLY)]


def scopes_of(policy):
    """All scopes; for a search, which settles what each group loses, the one without rivals."""
    return ("local",) if policy == "search" else SCOPES


def combinations(importance):
    """(aggregation, policy, scope): a third of the policies in every scope; every aggregation.

    One importance that takes no time goes through all policies. Rounds score again and again: each
    importance goes through them with one policy; not an ablation, which would take a forward pass
    for each unit in each round.
    """
    every = importance == "magnitude"
    third = POLICIES[BLOCK_IMPORTANCES.index(importance) % 3 :: 3]
    for policy, scope in itertools.product(POLICIES, SCOPES):
        if scope not in scopes_of(policy):
            continue
        one_with_rounds = policy == "uniform" and importance != "ablation"
        if every or one_with_rounds if scope == "iterative" else every or policy in third:
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
    compute, score = importance.measure, importance.structures

    def remember(self, model, graph, groups, batches, bounds=None):
        names = tuple(group.name for group in groups)
        if names not in known:
            with pytest.MonkeyPatch.context() as first:
                first.setattr(importance, "structures", score)  # which `measure` may call
                known[names] = compute(self, model, graph, groups, batches, bounds).structures
        return Measured(structures={n: own.clone() for n, own in known[names].items()})

    def structures(*args):
        return remember(*args).structures

    monkeypatch.setattr(importance, "measure", remember)
    monkeypatch.setattr(importance, "structures", structures)


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
    policy = POLICIES[i % len(POLICIES)]
    scopes = scopes_of(policy)
    check(overrides(importance, AGGREGATIONS[i % 6], policy, scopes[i % len(scopes)]))


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
