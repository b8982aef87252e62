import pytest
import torch
from conftest import example, tiny_llama, token_ids
from contracts import run
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import config as cfg
from prunekit.allocation.costs.weights import weights_cost
from prunekit.compensation import Obs as Repair
from prunekit.errors import ConfigError
from prunekit.graph import trace
from prunekit.importance import Magnitude, Obs
from prunekit.policies import (
    ExpectedLoss,
    LinearIncrease,
    LogDecrease,
    LogIncrease,
    Manual,
    Owl,
    Sensitivity,
    Setting,
    Single,
    Window,
)
from prunekit.policies.knapsack import Point, spread_saving
from prunekit.policies.manual import write_shares
from prunekit.schedules.method import Method

PARTS = ("self_attn", "mlp")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 3), min_size=3, max_size=3), min_size=3, max_size=3),
    st.floats(0.05, 2.5),
)
def test_the_knapsack_is_no_worse_than_any_grid_point(steps, target):
    """Convex curves (sorted slopes) of savings 1/3, 2/3, 1: against every combination on a fine
    grid.
    """
    points = (0.0, 1 / 3, 2 / 3, 1.0)
    curves, tables = {}, []
    for k, slopes in enumerate(steps):
        errors = [0.0, *torch.tensor(sorted(slopes)).cumsum(0).tolist()]
        curves[str(k)] = [*map(Point, points, points, errors)]
        tables.append(errors)

    def error(k, ratio):
        i = min(int(ratio * 3), 2)
        return tables[k][i] + (tables[k][i + 1] - tables[k][i]) * (ratio * 3 - i)

    best = spread_saving(curves, target)
    assert sum(best.values()) == pytest.approx(target)
    mine = sum(error(int(k), min(ratio, 1)) for k, ratio in best.items())
    grid = [i / 12 for i in range(13)]
    for a in grid:
        for b in grid:
            c = target - a - b
            if 0 <= c <= 1:
                assert mine <= error(0, a) + error(1, b) + error(2, c) + 1e-6


def test_shapes_are_those_of_the_papers():
    log = LogIncrease().shares(32)
    assert log[0] == 0.25
    assert log[31] == 1
    scale = 0.25  # SlimGPT's command: r_0 = 0.0625, r_31 = 0.25, the mean is 0.2004
    assert sum(log) / 32 * scale == pytest.approx(0.2004, abs=5e-5)
    window = Window().shares(32)
    assert [i for i, share in enumerate(window) if share] == list(range(4, 30))
    assert Window().shares(8) == [0, 1, 1, 1, 1, 1, 1, 0]
    assert LogDecrease().shares(7) == pytest.approx(LogIncrease().shares(7)[::-1])
    assert LinearIncrease().shares(4) == pytest.approx([0.25, 0.5, 0.75, 1])
    assert LinearIncrease().shares(1) == [1]


def test_manual_shares():
    assert Manual(values=[1, 2, 0]).shares(3) == [1, 2, 0]
    with pytest.raises(ConfigError, match="expected 4 numbers, one a layer, got 3"):
        Manual(values=[1, 2, 0]).shares(4)
    with pytest.raises(ConfigError, match="≥ 0"):
        Manual(values=[1, -2]).shares(2)
    with pytest.raises(ConfigError, match=r"policy.values or policy.path"):
        Manual()


def test_manual_shares_from_a_csv(tmp_path):
    path = tmp_path / "shares.csv"
    path.write_text("layer,share\n0,0.5\n1,1\n\n2,0.25\n")
    assert Manual(path=str(path)).shares(3) == [0.5, 1, 0.25]
    with pytest.raises(ConfigError, match="expected 4 numbers, one a layer, got 3"):
        Manual(path=str(path)).shares(4)
    path.write_text("0.5\n1\nnan\n")
    with pytest.raises(ConfigError, match="expected a number, got 'nan'"):
        Manual(path=str(path)).shares(3)
    with pytest.raises(ConfigError, match="No such file"):
        Manual(path=str(tmp_path / "none.csv")).shares(3)


def test_manual_shares_by_group(tmp_path):
    path = tmp_path / "shares.csv"
    shares = {f"layers.{i}.{part}": 0.1 * i + (part == "mlp") for i in range(4) for part in PARTS}
    path.write_text(write_shares(shares))
    chosen = ["importance=magnitude", "policy=manual", f"policy.path={path}"]
    _, result = run(chosen)
    assert result.report["policy"]["shares"] == shares
    path.write_text(write_shares({**shares, "layers.9.mlp": 1.0}))
    with pytest.raises(ConfigError, match=r"'layers\.9\.mlp' is no group: did you mean layers"):
        run(chosen)
    path.write_text(write_shares({"layers.0.mlp": 1.0}))
    with pytest.raises(ConfigError, match=r"a share for each group, got none for layers\."):
        run(chosen)
    path.write_text(write_shares({**shares, "layers.0.mlp": -1.0}))
    with pytest.raises(ConfigError, match="expected numbers ≥ 0"):
        run(chosen)


def test_window_of_a_model_too_shallow():
    with pytest.raises(ConfigError, match="use uniform"):
        Window().shares(2)


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


def test_expected_loss_cuts_where_the_next_unit_raises_the_loss_least():
    """At the optimum no unit that stays is cheaper for the loss than one that went."""
    model, ids = tiny_llama(layers=3), token_ids(8, 12)
    graph, cost = trace(model, example()), weights_cost(trace(model, example()))
    groups = [group for group in graph.groups if group.kind in ("attention", "mlp")]
    batches = [{"input_ids": ids, "use_cache": False}]
    setting = Setting(
        model=model,
        graph=graph,
        groups=groups,
        batches=batches,
        importance=Magnitude(),
        cost=cost,
        limit=0.8 * cost({}),
    )
    shares = ExpectedLoss().group_shares(setting)
    scores = Obs(compete="loss", outputs="full").score(model, graph, groups, batches)
    gone, left = [], []
    for group in groups:
        prices = scores[group.name].sort().values / (cost({}) - cost({group.name: 1}))
        count = round(shares[group.name] * group.num_units)
        gone += prices[:count].tolist()
        left += prices[count : group.num_units - 1].tolist()
    lost = {g.name: round(shares[g.name] * g.num_units) for g in groups}
    assert cost(lost) == pytest.approx(0.8 * cost({}), rel=0.05)
    assert gone and sum(max(gone) > price for price in left) <= 1, "one is cut in part"


def test_the_surgeon_weighs_outputs_and_cuts_by_the_expected_loss():
    method = Method.build(cfg.check(cfg.compose(["method=surgeon"])))
    assert method.importance == Obs(outputs="full")
    assert method.policy == ExpectedLoss()
    assert method.compensation == Repair()


@pytest.mark.parametrize("why", ["meta", "no loss", "several matrices"])
def test_shares_rise_with_the_depth_where_no_loss_is_expected(why, monkeypatch):
    said = []
    monkeypatch.setattr("prunekit.policies.expected_loss.say", said.append)
    model, batch = tiny_llama(layers=3), example()
    graph = trace(model, batch)
    kinds = ("attention", "channel") if why == "several matrices" else ("attention", "mlp")
    groups = [group for group in graph.groups if group.kind in kinds]
    if why == "meta":
        model = model.to("meta")
    if why == "no loss":
        batch = {"input_ids": batch["input_ids"], "logits_to_keep": 1}
    cost = weights_cost(graph)
    setting = Setting(
        model=model,
        graph=graph,
        groups=groups,
        batches=[batch],
        importance=Magnitude(),
        cost=cost,
        limit=0.8 * cost({}),
    )
    assert ExpectedLoss().group_shares(setting) == LogIncrease().group_shares(setting)
    reason = {"meta": "streamed", "no loss": "scalar `loss`", "several matrices": "single matrix"}
    assert reason[why] in said[0]


def test_unknown_variants_name_the_known_ones():
    with pytest.raises(ConfigError, match=r"policy.measure: unknown 'los': did you mean loss"):
        Sensitivity(measure="los")
    with pytest.raises(ConfigError, match=r"policy.by: unknown 'layers': did you mean layer"):
        Sensitivity(by="layers")


@pytest.mark.parametrize(
    ("policy", "options", "match"),
    [
        (Manual, {"values": 5}, "values: expected a list of numbers, got 5"),
        (Manual, {"path": 5}, "path: expected a CSV file, got 5"),
        (Sensitivity, {"ratios": 5}, r"ratios: expected a list of numbers in \(0, 1\), got 5"),
        (Sensitivity, {"ratios": "abc"}, "ratios: expected a list of numbers .* got 'abc'"),
        (Owl, {"spread": "abc"}, r"spread: expected a number in \[0, 1\], got 'abc'"),
        (Owl, {"multiple": "abc"}, "multiple: expected a number > 0, got 'abc'"),
        (LogIncrease, {"low_share": "abc"}, r"low_share: expected a number in \[0, 1\], got 'abc'"),
        (Window, {"start": "abc"}, "start: expected a whole number ≥ 0, got 'abc'"),
        (Single, {"layer": "abc"}, "layer: expected a whole number ≥ 0, got 'abc'"),
    ],
)
def test_options_of_another_type_are_refused(policy, options, match):
    with pytest.raises(ConfigError, match=f"policy.{match}"):
        policy(**options)
