"""The database's levels against what the ordinary schedule gives for the same counts."""

from contextlib import contextmanager

import pytest
import torch
from conftest import example, tiny_llama, token_ids

from prunekit.allocation.costs.weights import weights_cost
from prunekit.compensation import Bias
from prunekit.compensation import Obs as Repair
from prunekit.graph import trace
from prunekit.importance import Magnitude, Obs
from prunekit.policies import Setting
from prunekit.schedules.repair import cut_groups
from prunekit.search import bench as bench_module
from prunekit.search.bench import Bench
from prunekit.search.samples import split_samples

DAMPING = 0.01


@contextmanager
def open_bench(importance, compensation, layerwise=True):
    model = tiny_llama(kv_heads=2, layers=2)
    graph = trace(model, example())
    groups = [group for group in graph.groups if group.kind in ("attention", "mlp")]
    cost = weights_cost(graph)
    setting = Setting(
        model=model,
        graph=graph,
        groups=groups,
        batches=[{"input_ids": ids, "use_cache": False} for ids in token_ids(24, 16).split(6)],
        importance=importance,
        cost=cost,
        limit=cost({}) * 0.9,
        compensation=compensation,
        layerwise=layerwise,
        damping=DAMPING,
    )
    samples = split_samples(setting.batches, 0.25, 0.125, 64)
    with Bench.open(setting, samples, len(samples.fitness)) as bench:
        yield bench


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run_ordinarily(bench, counts):
    """The weights of the model after an ordinary cut by these counts; the cut is undone."""
    bench.database.place({})
    builder = bench.builder
    if builder.orders is None:
        cut_groups(builder.assignment, DAMPING, counts=counts)
    else:
        chosen = {name: builder.orders[name][:count] for name, count in counts.items()}
        cut_groups(builder.assignment, DAMPING, chosen=chosen)
    after = weights(bench.setting.model)
    bench.database.reset_all()
    return after


def differences(one, other):
    zero = torch.zeros(1)
    return {name for name in one.keys() | other.keys()
            if not torch.equal(one.get(name, zero), other.get(name, zero))}  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        (Obs(), Repair(target="pruned")),
        (Obs(), Repair(target="residual")),
        (Obs(columns="dynamic_group", refine="swap"), Repair(target="dense")),
        (Obs(), None),
        (Magnitude(), Repair(bias=True)),
        (Magnitude(), Bias()),
    ],
)
def test_a_level_is_what_an_ordinary_run_would_make_of_the_group(method):
    with open_bench(*method) as bench:
        bench.open_round({}, 0.25, 1.0)
        first, second = bench.budget.slots[0], bench.budget.slots[1]
        both = {first.name: 1, second.name: 10}  # residual targets take blocks that are cut too
        for counts in (both, {second.name: 10}, {second.name: 20}):
            bench.database.place(counts)
            level = weights(bench.setting.model)
            different = differences(level, run_ordinarily(bench, counts))
            # Behind the first group the ordinary run has the inputs that its cut gives.
            behind = {n for n in different if ".mlp." in n} if counts is both else set()
            assert different == behind
        if method[0] == Obs() or bench.builder.orders is not None:
            few, many = (bench.database.units({second.name: k})[second.name] for k in (10, 20))
            assert few == many[:10]


def test_the_expected_cut_is_in_the_database_as_an_ordinary_run_makes_it():
    with open_bench(Obs(), Repair(target="residual")) as bench:
        counts = {slot.name: slot.removed[len(slot.removed) // 3] for slot in bench.budget.slots}
        bench.open_round(counts, 0.25, 1.0)
        bench.database.place(counts)
        level = weights(bench.setting.model)
        ordinary = run_ordinarily(bench, counts)
        assert level.keys() == ordinary.keys()
        for name, tensor in ordinary.items():
            torch.testing.assert_close(level[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_database_takes_at_most_so_many_bytes(monkeypatch):
    """Levels far from the centre are left out then."""
    with open_bench(Obs(), Repair(target="pruned")) as bench:
        counts = {slot.name: slot.removed[len(slot.removed) // 3] for slot in bench.budget.slots}
        weights = sum(p.numel() * p.element_size() for p in bench.setting.model.parameters())
        whole = bench.open_round(counts, 0.125, 0.5).space
        assert bench.database.nbytes == bench.database.count_bytes(whole.counts_by_group())
        assert bench.plan_levels(counts, 0.125, 0.5).levels == whole.levels
        monkeypatch.setattr("prunekit.search.bench.LARGEST", 0.6 * bench.database.nbytes / weights)
        space = bench.open_round(counts, 0.125, 0.5).space
        assert bench.database.nbytes <= bench_module.LARGEST * weights
        for own, all_levels, centre in zip(
            space.levels, whole.levels, bench.steps_of(counts), strict=True
        ):
            assert {0, centre} <= set(own) <= set(all_levels)
        assert sum(map(len, space.levels)) > 2 * len(space.levels)


def test_masks_take_no_weights_and_need_no_walk():
    with open_bench(Magnitude(), None, layerwise=False) as bench:
        before = weights(bench.setting.model)
        bench.open_round({}, 0.25, 1.0)
        assert bench.database.nbytes == 0
        ffn = bench.budget.slots[1].groups[0]
        bench.database.place({ffn.name: 10})
        gone = bench.database.units({ffn.name: 10})[ffn.name]
        after = weights(bench.setting.model)
        (changed,) = differences(before, after)
        assert changed.endswith("down_proj.weight")
        expected = before[changed].index_fill(1, torch.tensor(gone), 0)
        assert torch.equal(after[changed], expected)


def test_the_model_is_put_back_after_an_error():
    model = None
    with pytest.raises(RuntimeError), open_bench(Magnitude(), Bias()) as bench:
        model = bench.setting.model
        before = weights(model)
        bench.open_round({}, 0.25, 1.0)
        bench.database.place({slot.name: slot.removed[1] for slot in bench.budget.slots[:1]})
        raise RuntimeError
    assert differences(before, weights(model)) == set()


def test_levels_are_kept_in_halves_where_they_are_judged_so():
    with open_bench(Obs(), Repair()) as bench:
        database, found = bench.database, []
        levels = {group.name: [0, 1] for group in bench.setting.groups}
        expected = dict.fromkeys(levels, 0)
        for halves in (False, True):
            database.halves = halves
            bench.builder.fill(database, levels, expected)
            assert database.nbytes == database.count_bytes(levels)
            database.place(dict.fromkeys(levels, 1))
            found.append((weights(bench.setting.model), database.nbytes))
        (wide, nbytes), (half, fewer) = found
        assert nbytes == 2 * fewer
        for group in bench.setting.groups:
            for member in group.members:
                if member.role == "consumer":
                    rounded = wide[member.parameter].bfloat16().float()
                    assert torch.equal(half[member.parameter], rounded)
