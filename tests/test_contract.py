"""Pieces together: kinds of groups, compensations, mistakes; contracts have files of their own."""

import pytest
import torch
from conftest import tiny_llama, token_ids
from contracts import run, run_on

import prunekit


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
            r"policy.ratios: expected a list of numbers in \(0, 1\)",
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
