"""The policy as a whole: against every candidate, repeated, resumed, in several processes."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import example, tiny_llama, token_ids
from processes import run_together

import prunekit
from prunekit.allocation.costs import latency
from prunekit.allocation.costs.latency import Stopwatch
from prunekit.allocation.costs.weights import weights_cost
from prunekit.compensation import Obs as Repair
from prunekit.errors import ConfigError, DataError
from prunekit.graph import trace
from prunekit.importance import Magnitude, Obs
from prunekit.policies import ExpectedLoss, Setting, Uniform
from prunekit.search import Search
from prunekit.search.arena import Arena
from prunekit.search.bench import Bench, Checked, make_budget
from prunekit.search.build import Builder
from prunekit.search.evolution import Stage
from prunekit.search.fitness import Divergence, Judge
from prunekit.search.rounds import Effort, Start, run_round
from prunekit.search.samples import split_samples
from prunekit.search.search import FORMULAS, _check
from prunekit.search.verdict import judge_cuts, lead_over

QUICK = {"tokens": (64, 128), "survivors": (2, 1), "children": 4, "generations": 2, "sweeps": 2}
QUICK |= {"seeds": ("uniform", "log_increase", "knapsack"), "rounds": 2}
TOKENS = ["policy.tokens=[64,128]", "policy.survivors=[2,1]"]
LITTLE = [*TOKENS, "policy.children=2", "policy.generations=1", "policy.sweeps=1"]
ONE_ROUND = ["policy.seeds=[uniform,knapsack]", "policy.rounds=1"]
ONE_STEP = [*TOKENS, "policy.generations=0", "policy.sweeps=1"]
ONE_STEP += ["policy.seeds=[uniform]", "policy.rounds=1"]


def make_setting(importance=None, compensation=None, samples=24, layers=2, removed=None):
    """A model of which a fifth must go, or as much as goes with so many channels of its FFNs."""
    model = tiny_llama(kv_heads=2, layers=layers)
    graph = trace(model, example())
    kinds = ("attention", "mlp") if removed is None else ("mlp",)
    groups = [group for group in graph.groups if group.kind in kinds]
    cost = weights_cost(graph)
    limit = cost({}) * 0.8 if removed is None else cost({groups[0].name: removed})
    ids = token_ids(samples, 16)
    return Setting(
        model=model,
        graph=graph,
        groups=groups,
        batches=[{"input_ids": part, "use_cache": False} for part in ids.split(6)],
        importance=importance or Obs(),
        cost=cost,
        limit=limit,
        compensation=compensation,
        layerwise=True,
        damping=0.01,
    )


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", [(Obs(), Repair()), (Obs(), None)])
def test_a_round_finds_the_best_of_all_candidates(method):
    """Of all ways to take 40 of 4 · 40 channels by tens; all cost the same."""
    setting = make_setting(*method, layers=4, removed=40)
    samples = split_samples(setting.batches, 0.25, 0.25, 32)
    with Bench.open(setting, samples, len(samples.fitness)) as bench:
        seed = make_budget(setting, Uniform().group_shares(setting)).solve()
        batches = len(bench.judge.batches)
        effort = Effort(
            sweeps=3,
            generations=6,
            children=8,
            prices=4,
            stages=[Stage(batches=1, survivors=6), Stage(batches=batches, survivors=2)],
        )
        start = Start(centre=seed, others=[], step=0.25, reach=1.0, packs=True, first=False)
        result = run_round(bench, start, effort, random.Random(0))
        assert result.packed is None  # it is a seed in the first round alone
        arena = bench.open_round(seed, 0.25, 1.0)
        space = arena.space
        near = [
            candidate
            for candidate in product(*space.levels)
            if space.cost(candidate) == space.budget.limit
        ]
        assert len(near) > 25
        values = arena.measure_at_limit(near, batches)
        winner = space.nearest(result.winner.counts)
        assert space.counts(winner) == result.winner.counts
        assert arena.measure_at_limit([winner], batches)[0] <= min(values)


@pytest.fixture(scope="module")
def searched():
    """One search, with its setting and its shares."""
    setting = make_setting(Obs(), Repair())
    before = weights(setting.model)
    shares = Search(**QUICK).group_shares(setting)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(setting.model).items())
    return setting, shares


def test_the_same_seed_gives_the_same_search(searched):
    setting, shares = searched
    again = replace(setting, notes={})
    assert Search(**QUICK).group_shares(again) == shares
    assert again.notes == setting.notes


def test_the_report_tells_what_was_tried(searched):
    setting, shares = searched
    figures = setting.notes["search"]
    assert figures.cuts.keys() >= {"uniform", "log_increase", "knapsack", "round 1"}
    assert figures.cuts[figures.taken].shares == shares
    assert figures.evaluations == sum(part.evaluations for part in figures.rounds)
    assert figures.prices.keys() == shares.keys()
    assert all(price >= 0 for price in figures.prices.values())
    assert figures.samples == {"database": 12, "fitness": 6, "held_out": 6}
    for part in figures.rounds:
        values = [point.divergence for point in part.curve]
        assert values == sorted(values, reverse=True)
        assert part.database_bytes > 0
    rounds = {name: cut for name, cut in figures.cuts.items() if name.startswith("round")}
    assert len(rounds) == len(figures.rounds)
    best = min(rounds, key=lambda name: rounds[name].held_out)
    assert rounds[best].lead == 0
    assert figures.taken in (best, "uniform", "log_increase", "knapsack")


def test_a_search_without_repair_keeps_no_weights():
    setting = make_setting(Magnitude(), None)
    Search(**QUICK | {"rounds": 1, "seeds": ["uniform"]}).group_shares(setting)
    (only,) = setting.notes["search"].rounds
    assert only.database_bytes == 0


def checked(*means):
    sums = torch.tensor(means, dtype=torch.float64)
    held_out = Divergence(sums=sums, counts=torch.ones(len(means)).double())
    return Checked(counts={}, fitness=0.0, held_out=held_out)


def test_the_winner_must_lead_the_best_seed_beyond_doubt():
    winner = checked(1.0, 2.0, 3.0, 4.0)
    clear = checked(1.1, 2.1, 3.15, 4.1)  # leads of 0.1 but for 0.15: 9 standard errors
    noisy = checked(0.5, 3.5, 2.5, 5.5)  # a lead of 0.5 ± 0.58
    assert judge_cuts({"a": clear}, winner)[0] == "winner"
    # The noisy seed is worse than the clear one, which is what would be taken instead.
    assert judge_cuts({"a": clear, "b": noisy}, winner)[0] == "winner"
    taken, verdict = judge_cuts({"b": noisy, "c": checked(9.0, 9.0, 9.0, 9.0)}, winner)
    assert taken == "b"  # the seed with the lowest KL on held-out samples
    assert "not better than the best seed, b, beyond doubt" in verdict
    lead, error = lead_over(winner, noisy)
    differences = torch.tensor([-0.5, 1.5, -0.5, 1.5]).double()
    assert lead == pytest.approx(0.5)
    assert error == pytest.approx(float(differences.std()) / 2)
    assert judge_cuts({"a": checked(5.0)}, checked(1.0))[0] == "a"  # one sample proves nothing


def test_the_seed_that_is_led_least_counts_where_samples_differ_in_length():
    """A lead is the mean over samples; the KL of a cut is that over positions."""
    lengths = torch.tensor([1.0, 1.0, 10.0]).double()

    def cut(*means):
        sums = torch.tensor(means).double() * lengths
        return Checked(counts={}, fitness=0.0, held_out=Divergence(sums=sums, counts=lengths))

    winner, long = cut(2.0, 2.1, 2.0), cut(3.0, 3.2, 2.5)
    short = cut(1.0, 1.0, 3.0)  # worse by its positions, better by its samples
    assert short.held_out.mean > long.held_out.mean
    assert judge_cuts({"long": long}, winner)[0] == "winner"
    assert judge_cuts({"long": long, "short": short}, winner)[0] == "short"


@pytest.mark.parametrize(("cost", "ratio"), [("flops", 0.5), ("parameters", 0.6)])
def test_the_cut_that_was_checked_is_the_one_that_is_made(cost, ratio):
    """Whole FFNs may go and heads are dear, so that no single level brings the cost nearer."""
    model = tiny_llama(kv_heads=2, layers=2)
    sizes = {group.name: group.num_units for group in trace(model, example()).groups}
    result = prunekit.prune(
        model,
        ratio=ratio,
        calibration=token_ids(24, 16),
        overrides=["policy=search", f"cost={cost}", *LITTLE, *ONE_ROUND],
    )
    search = result.report["policy"]["search"]
    shares = search["cuts"][search["taken"]]["shares"]
    expected = {name: round(share * sizes[name]) for name, share in shares.items() if share}
    assert {name: len(units) for name, units in result.plan.removed.items()} == expected


def test_the_budget_is_met_as_exactly_as_with_a_formula():
    model, ids = tiny_llama(kv_heads=2, layers=2), token_ids(24, 16)
    options = ["policy=search", *LITTLE, *ONE_ROUND]
    result = prunekit.prune(model, ratio=0.25, calibration=ids, overrides=options)
    formula = prunekit.prune(tiny_llama(kv_heads=2, layers=2), ratio=0.25, calibration=ids)
    channel = 3 * 48 + 2
    dense = result.report["parameters"]["dense"]
    for report in (result.report, formula.report):
        assert abs(report["parameters"]["pruned"] - 0.75 * dense) <= channel / 2 + 1
    assert result.report["policy"]["search"]["verdict"]
    json.dumps(result.report["policy"])


@pytest.mark.parametrize(("cost", "channel"), [("bytes", 4 * 146), ("flops", 2 * 64 * 3 * 48)])
def test_other_costs_are_met_as_exactly(cost, channel):
    report = prunekit.prune(
        tiny_llama(kv_heads=2),
        ratio=0.4,
        calibration=token_ids(24, 16),
        overrides=["policy=search", f"cost={cost}", *ONE_STEP],
    ).report
    assert report["target"]["limit"] == pytest.approx(0.6 * report["target"]["dense"])
    assert abs(report["target"]["achieved"] - report["target"]["limit"]) <= channel / 2 + 1


def test_seconds_are_met_by_the_measured_table(monkeypatch):
    """A stopwatch by which a key-value head takes 3 seconds, and a channel 0.25."""
    dense = {"attention": 2, "mlp": 40}
    each = {"attention": 3.0, "mlp": 0.25}
    model, total = tiny_llama(kv_heads=2, layers=2), 33.0
    kinds = {group.name: group.kind for group in trace(model, example()).groups}

    def seconds(watch, place, kept):
        whole = total if place == "" else 17.0  # one of the two layers, and a second of its own
        return whole - sum(each[kinds[n]] * (dense[kinds[n]] - k) for n, k in kept.items())

    monkeypatch.setattr(Stopwatch, "seconds", seconds)
    monkeypatch.setattr(latency, "median_seconds", lambda *a: total)
    monkeypatch.setattr(latency, "time_model", lambda *a, **b: 0.0)
    result = prunekit.prune(
        model,
        ratio=0.4,
        calibration=token_ids(24, 16),
        overrides=["policy=search", "cost=latency", *ONE_STEP],
    )
    gone = sum(each[kinds[name]] * len(units) for name, units in result.plan.removed.items())
    assert abs(gone - 0.4 * total) <= each["mlp"] / 2
    assert result.report["target"]["achieved"] == pytest.approx(total - gone)
    assert result.report["policy"]["search"]["cuts"].keys() == {"uniform", "round 1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 0}, r"policy\.step: expected a number in \(0, 0\.5\], got 0"),
        ({"rounds": 0}, r"policy\.rounds: expected a whole number ≥ 1, got 0"),
        ({"tokens": [64]}, r"policy\.survivors: expected a number for each stage"),
        ({"tokens": 64}, r"policy\.tokens: expected a list of numbers, got 64"),
        ({"prices": 0}, r"policy\.prices: expected a whole number ≥ 1, got 0"),
        ({"fitness": 0.7, "held_out": 0.3}, r"policy\.fitness, policy\.held_out"),
        ({"seeds": ["unifrom"]}, r"policy\.seeds: unknown 'unifrom': did you mean uniform"),
        ({"seeds": ["knapsack"]}, r"policy\.seeds: expected one of uniform"),
    ],
)
def test_options_out_of_range_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        Search(**options)


def test_a_seed_that_measures_sees_the_samples_of_the_database_alone(monkeypatch):
    setting, seen = make_setting(), []
    monkeypatch.setattr(
        ExpectedLoss,
        "group_shares",
        lambda self, setting: seen.append(setting.batches) or Uniform().group_shares(setting),
    )
    bench = SimpleNamespace(
        setting=setting,
        builder=SimpleNamespace(assignment=SimpleNamespace(batches=setting.batches[:1])),
        check=lambda counts: SimpleNamespace(to_json=lambda: counts),
    )
    counts = _check(bench, FORMULAS["expected_loss"]())
    assert seen == [setting.batches[:1]] and len(setting.batches) > 1
    assert counts == _check(bench, Uniform()) and sum(counts.values())


def test_a_search_that_can_not_be_sound_is_refused():
    with pytest.raises(DataError, match="three parts"):
        Search(**QUICK).group_shares(make_setting(samples=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["scope=layer"], "policy=search: expected scope=local, got scope.ranking=layer"),
        (["scope.rounds=2"], "scope.rounds=2: importance=obs chooses layer by layer"),
        (["groups=independent"], "groups=independent: importance=obs chooses layer by layer"),
        (["groups=channel"], "policy=search: expected groups in one list of layers"),
        (
            ["groups=[attention,query_head]"],
            r"got layers\.0\.self_attn and layers\.0\.self_attn\.query_head, which both own "
            r"columns of model\.layers\.0\.self_attn\.o_proj",
        ),
    ],
)
def test_what_a_search_can_not_do_is_refused_before_it_begins(options, message, monkeypatch):
    monkeypatch.delattr(Bench, "check")
    with pytest.raises(ConfigError, match=message):
        prunekit.prune(
            tiny_llama(kv_heads=2),
            calibration=token_ids(24, 16),
            overrides=["policy=search", *options],
        )


class Power:
    """Counts what a search works on; goes off once at each of these (name, number)."""

    def __init__(self, monkeypatch, offs):
        self.offs, self.counts = list(offs), Counter()
        for owner, name in ((Builder, "_fill_group"), (Judge, "measure"), (Bench, "check")):
            monkeypatch.setattr(owner, name, self.counting(name, getattr(owner, name)))

    def counting(self, name, method):
        def count(*args):
            self.counts[name] += 1
            if self.offs and self.offs[0] == (name, self.counts[name]):
                del self.offs[0]
                raise KeyboardInterrupt
            return method(*args)

        return count


def test_a_search_broken_off_anywhere_goes_on_to_the_same_end(monkeypatch, tmp_path):
    """Between rounds and inside of them; what was finished is not done again."""
    overrides = ["policy=search", "policy.seeds=[uniform]", "policy.rounds=2", *LITTLE]
    options = {"ratio": 0.25, "calibration": token_ids(24, 16)}
    power = Power(monkeypatch, [])
    whole = prunekit.prune(tiny_llama(kv_heads=2, layers=2), overrides=overrides, **options)
    work, power.counts = power.counts, Counter()
    # Each round fills 4 groups; the seed and the winners of two rounds are checked.
    offs = [("check", 1), ("_fill_group", 3), ("measure", 16), ("check", 3), ("_fill_group", 8)]
    power.offs = [*offs, ("check", 5)]
    model, state = tiny_llama(kv_heads=2, layers=2), tmp_path / "state"
    before = weights(model)
    result = None
    for _ in range(len(power.offs) + 1):
        assert result is None
        try:
            result = prunekit.prune(
                model, overrides=[*overrides, "resume=true"], state=state, **options
            )
        except KeyboardInterrupt:
            assert all(torch.equal(before[name], own) for name, own in weights(model).items())
    assert result is not None
    assert not power.offs
    assert result.plan == whole.plan
    assert result.report["policy"] == whole.report["policy"]
    after = weights(result.model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(whole.model).items())
    assert not state.exists()
    assert power.counts["_fill_group"] == work["_fill_group"] + 2  # those that were broken off
    assert power.counts["check"] == work["check"] + 3
    assert work["measure"] < power.counts["measure"] < 1.5 * work["measure"]


def test_several_processes_share_the_candidates(monkeypatch):
    """Each process runs every second candidate, and learns the results of the others."""
    setting = make_setting(Magnitude(), None)
    samples = split_samples(setting.batches, 0.25, 0.25, 32)
    with Bench.open(setting, samples, len(samples.fitness)) as bench:
        arena = bench.open_round({}, 0.5, 1.0)
        candidates = list(product(*arena.space.levels))[:9]
        expected = arena.measure(candidates, 2)
        others = [(c, [part.to_json() for part in arena._known[c]]) for c in candidates[1::2]]
        shared = Arena(space=arena.space, database=bench.database, judge=bench.judge)
        ran = []

        def gather(part):
            ran.extend(candidate for candidate, _ in part[0])
            return [part, (others, 100.0)]

        monkeypatch.setattr("prunekit.search.arena.own_part", lambda items: items[::2])
        monkeypatch.setattr("prunekit.search.arena.gather_all", gather)
        assert shared.measure(candidates, 2) == pytest.approx(expected, rel=1e-6)
        assert ran == candidates[::2]
        assert shared.evaluations == 9
        assert 100 < shared.tokens < 100 + arena.tokens  # those of all processes
        assert shared.measure(candidates, 1)
        assert ran == candidates[::2]  # nothing is judged twice


_JOB = """
import torch
from pathlib import Path
from conftest import tiny_llama, token_ids
from test_search import prune_in_double
from prunekit.runtime.processes import process_group, rank
with process_group(torch.device("cpu")):
    Path(f"rank{rank()}").write_text(prune_in_double().plan.to_json())
"""


def prune_in_double():
    """A search whose sums don't depend, but for the last digits, on who adds them up."""
    options = [*LITTLE, "policy.rounds=1", "policy.seeds=[expected_loss,knapsack]"]
    return prunekit.prune(
        tiny_llama(kv_heads=2, layers=2).double(),
        ratio=0.25,
        calibration=token_ids(24, 16),
        overrides=["policy=search", *options, "data.calibration.batch_size=5"],
    )


def test_two_processes_find_what_one_finds(tmp_path):
    for done in run_together(_JOB, cwd=tmp_path):
        assert done.returncode == 0, done.stderr
    plan = prune_in_double().plan.to_json()
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [plan, plan]
