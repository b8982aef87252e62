"""Hard-concrete gates against Monte Carlo and finite differences; smooth against true costs."""

import pytest
import torch
from conftest import example, tiny_llama, token_ids

import prunekit
from prunekit.allocation.costs import Cost, CostSetting, Parameters, Term
from prunekit.allocation.costs.smooth import SmoothCost
from prunekit.errors import ConfigError
from prunekit.gates import Bounds, HardConcreteRule, Layout, Training
from prunekit.gates.hard_concrete import draw, expected, value
from prunekit.graph import trace
from prunekit.importance import HardConcrete

CPU = torch.device("cpu")


@pytest.mark.parametrize("temperature", [0.4, 2 / 3])
def test_the_expected_share_and_its_gradient_are_those_of_monte_carlo(temperature):
    log_alpha = torch.tensor([-2.0, -0.5, 0.0, 1.5], dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(200_000, 4, generator=generator, dtype=torch.float64)

    def share(at):
        return (draw(at, uniform, temperature) > 0).double().mean(0)

    closed = expected(log_alpha, temperature)
    torch.testing.assert_close(share(log_alpha.detach()), closed.detach(), rtol=0, atol=4e-3)
    closed.sum().backward()
    step = 0.1
    slope = (share(log_alpha.detach() + step) - share(log_alpha.detach() - step)) / (2 * step)
    torch.testing.assert_close(slope, log_alpha.grad, rtol=0, atol=6e-3)


def test_a_gate_is_a_number_in_0_to_1_and_at_both_ends_with_a_probability():
    uniform = torch.linspace(1e-4, 1 - 1e-4, 10_001, dtype=torch.float64)
    gates = draw(torch.zeros(()).double(), uniform, 2 / 3)
    assert 0 < (gates == 0).double().mean() < 0.5
    assert 0 < (gates == 1).double().mean() < 0.5
    assert float(value(torch.zeros(()))) == pytest.approx(0.5)
    assert value(torch.tensor([-4.0, 4.0])).tolist() == [0, 1]


def test_the_smooth_cost_is_the_cost_and_has_its_gradient():
    graph = trace(tiny_llama(kv_heads=2), example())
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp", "query_head", "channel")]
    names = [group.name for group in groups]
    setting = CostSetting(model=tiny_llama(kv_heads=2), graph=graph, groups=groups, batches=[])
    tables = {names[0]: (0.0, 1.5, 2.0), "elsewhere": (3.0, 4.0)}
    counted = Parameters().measure(setting)
    extra = Term(coefficient=2.0, sizes=(5,), cuts=())
    cost = Cost(name="mine", terms=(*counted.terms, extra), tables=tables)
    smooth = SmoothCost(cost, names, CPU)
    generator = torch.Generator().manual_seed(4)
    sizes = torch.tensor([group.num_units for group in groups]).double()
    removed = (torch.rand(len(names), generator=generator).double() * (sizes - 1)).requires_grad_()

    def exact(at):
        return cost(dict(zip(names, at.tolist(), strict=True))) / cost({})

    left = smooth(removed)
    assert left.item() == pytest.approx(exact(removed.detach()), rel=1e-12)
    left.backward()
    for i in range(0, len(names), 2):
        step = torch.zeros_like(removed)
        step[i] = 1e-4
        slope = (exact(removed.detach() + step) - exact(removed.detach() - step)) / 2e-4
        assert float(removed.grad[i]) == pytest.approx(slope, rel=1e-6)


def prune(train, scope="global", ratio=0.3, **options):
    return prunekit.prune(
        tiny_llama(kv_heads=2, layers=1),
        ratio=ratio,
        method="llm_pruner",
        policy="uniform",
        importance=HardConcrete(train=train, **{"pressure": 1.0, **options}),
        calibration=token_ids(8, 9),
        overrides=[f"scope={scope}", "shapes=free", "data.calibration.batch_size=4"],
    )


def test_the_multiplier_does_not_press_on_once_the_target_is_met(monkeypatch):
    left = {}

    def note(rule):
        left["share"], left["target"] = float(rule.shares().detach()), float(rule.target)

    monkeypatch.setattr(HardConcreteRule, "check", note)
    prune(Training(steps=80, reach=0.4), ratio=0.4)
    assert left["target"] == pytest.approx(0.6, abs=1e-6)
    assert 0.38 < left["share"] < 0.65  # 0.24 where the multiplier stays


@pytest.mark.parametrize("scope", ["local", "global"])
def test_gates_come_down_to_the_target_before_training_ends(scope):
    result = prune(Training(steps=60, reach=0.3, learning_rate=0.2), scope)
    assert result.report["ratio"]["achieved"] == pytest.approx(0.3, abs=5e-3)
    assert any(group.num_units > 8 for group in result.graph.groups)


def test_a_rate_that_never_reaches_the_target_is_an_error_that_says_how_far_it_came():
    with pytest.raises(ConfigError, match=r"came down to 9.*raise importance\.pressure"):
        prune(Training(steps=4, reach=0, learning_rate=1e-4))
    with pytest.raises(ConfigError, match=r"importance\.pressure: expected a number > 0"):
        HardConcrete(pressure=0)


@pytest.mark.parametrize("together", [True, False])
def test_balanced_multipliers_leave_of_the_loss_what_does_not_change_the_cost(together):
    """At the target, a step along the gradient changes no cost, whatever the size of the loss."""
    graph = trace(tiny_llama(kv_heads=2, layers=1), example())
    groups = [group for group in graph.groups if group.kind in ("attention", "mlp")]
    layout = Layout(groups, CPU)
    weights = torch.linspace(1, 2, sum(layout.sizes))

    def share(removed):
        return 1 - (removed * torch.tensor([5.0, 1.0])).sum() / 60

    bounds = Bounds(
        solve=lambda *_: {},
        competing=together,
        prices=dict.fromkeys(layout.names, 1.0),
        pinned={name: {} for name in layout.names},
        share=share if together else None,
    )
    options = {"scale": True, "sublayers": True, "multiplier": "balanced"}
    rule = HardConcreteRule(layout, bounds, weights, pressure=3.0, **options)
    rule.temperature = 0.5
    assert rule.penalty() is None
    leaves = list(rule.parameters.values())
    prices = torch.autograd.grad(rule.shares().sum(), leaves)

    def correct(size, missing):
        rule.target.copy_(rule.shares().detach() - missing)
        for leaf in leaves:
            leaf.grad = size * torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0))
        rule.correct_gradients()
        return [leaf.grad.clone() for leaf in leaves]

    still, larger, pressed = correct(1.0, 0.0), correct(10.0, 0.0), correct(1.0, 0.1)
    owner = torch.cat([layout.group_of, torch.arange(len(groups))]) * (not together)
    one, ten, more, price = (torch.cat(list(parts)) for parts in (still, larger, pressed, prices))
    for constraint in owner.unique():
        own = owner == constraint
        assert float((one[own] * price[own]).sum()) == pytest.approx(0, abs=1e-6)
        assert float((more[own] * price[own]).sum()) > 1e-4  # descent lowers the cost
    torch.testing.assert_close(ten, 10 * one, rtol=1e-4, atol=1e-6)
