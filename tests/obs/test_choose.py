import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import Counting, Tape
from problems import collinear, error, inputs, left_error, optimum, peak, single

from prunekit.obs import choose, downdate, matrices
from prunekit.obs.choose import (
    SIZES,
    choose_columns,
    choose_units,
    dynamic_sizes,
    fixed_sizes,
    greedy_sizes,
    order_columns,
    order_units,
    released_sizes,
)
from prunekit.obs.inverse import Problem, invert, removal_error
from prunekit.obs.swap import swap

GROUPS = ["greedy", "dynamic_group", "released_group", "fixed_group"]


def naive(problems, sizes):
    """One group of single columns after another by rank-one updates of every W and A."""
    work = [
        (p.weight[:, p.index[:, 0]].clone(), p.inverse[p.index[:, 0]][:, p.index[:, 0]])
        for p in problems
    ]
    order = []
    for size in sizes:
        scores = sum(w.square().sum(0) / a.diagonal() for w, a in work)
        scores[order] = torch.inf
        for p in scores.argsort()[:size].tolist():
            order.append(p)
            work = [
                (w - torch.outer(w[:, p], a[p]) / a[p, p], a - torch.outer(a[:, p], a[p]) / a[p, p])
                for w, a in work
            ]
    return order


@pytest.fixture(params=[512, 16])
def panel(request, monkeypatch):
    monkeypatch.setattr(matrices, "_PANEL", request.param)


@pytest.mark.parametrize(("n", "count"), [(24, 23), (200, 150), (600, 256), (600, 257), (300, 300)])
def test_greedy_columns_are_those_of_the_naive_loop(n, count, panel):
    _, w, h = inputs(n, 16, 3 * n, seed=n)
    problem = single(w, invert(h, 1e-4).matrix)
    assert choose_columns([problem], count) == naive([problem], [1] * count)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 60),
    st.integers(0, 10_000),
    st.sampled_from(GROUPS),
    st.integers(1, 3),
    st.data(),
)
def test_any_columns_of_any_consumers_as_the_naive_loop_has_them(n, seed, groups, consumers, data):
    units = data.draw(st.integers(1, n))
    count = data.draw(st.integers(0, units))
    problems = []
    for i in range(consumers):
        _, w, h = inputs(n, 5 + i, 3 * n + 20, seed + i)
        index = torch.randperm(n, generator=torch.Generator().manual_seed(seed + i))[:units, None]
        problems.append(Problem(weight=w * 10.0**i, inverse=invert(h, 1e-3).matrix, index=index))
    sizes = [1] * count if groups == "greedy" else SIZES[groups](count)
    assert choose_columns(problems, count, groups) == naive(problems, sizes)


@pytest.fixture
def wholes(monkeypatch):
    """Both matrices whole and no column ever gone, as on a GPU."""
    monkeypatch.setattr(downdate, "hold", matrices.Wholes)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(0, 10_000), st.integers(1, 2), st.floats(0, 3), st.data())
def test_a_gpus_matrices_and_graphs_give_the_columns_of_a_cpu(n, seed, consumers, ill, data):
    count = data.draw(st.integers(1, n))
    problems = []
    for i in range(consumers):
        h, w = collinear(n, seed + i, noise=10**-ill)
        problems.append(single(w, invert(h, 1e-9).matrix))
    graphs = []

    def capture(work, device):
        graphs.append(Tape(work))
        return graphs[-1].replay

    for groups in GROUPS:
        expected = choose_columns(problems, count, groups)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(downdate, "hold", matrices.Wholes)
            patched.setattr(choose, "BLOCK", 8)
            plain = choose_columns(problems, count, groups)
            patched.setattr(choose, "capture", capture)
            assert choose_columns(problems, count, groups) == plain == expected
    assert len(graphs) == (count > 8)


def test_a_gpu_is_given_nine_operations_a_column_and_one_graph_a_block(wholes, monkeypatch):
    problem = single(torch.randn(5, 200), torch.eye(200))
    launched = []
    for count in (40, 90):
        with Counting() as counting:
            order_columns([problem], count)
        launched.append(counting.launched.total())
        assert not counting.waited
    # argmin, a look-up of what earlier steps gave p, the two rows, their correction, w and t, both
    # diagonals, their floor, the mark of p, the quotients: each reads all that the one before it
    # wrote, so that plain operators can't do with six. A kernel of our own for the last four would
    # save little beside a CUDA graph, in which a small operation takes a few microseconds.
    assert (launched[1] - launched[0]) / 50 == 9
    replays = []
    monkeypatch.setattr(choose, "BLOCK", 16)
    monkeypatch.setattr(choose, "capture", lambda *_: partial(replays.append, 1))
    order_columns([problem], 90)
    assert len(replays) == 5  # six blocks; the first one goes step by step


@pytest.mark.parametrize("consumers", [1, 2])
def test_greedy_columns_never_wait_for_the_device(consumers):
    """A tensor on the meta device has no values that anything could wait for."""
    problem = single(torch.randn(5, 300, device="meta"), torch.eye(300, device="meta"))
    problem = replace(problem, index=problem.index.to("meta"))
    assert order_columns([problem] * consumers, 290).shape == (290,)
    with pytest.raises(NotImplementedError, match="meta"):
        choose_columns([problem], 2)


def test_released_sizes_are_those_of_its_recurrence():
    assert list(released_sizes(0)) == []
    assert list(released_sizes(50)) == [50]
    assert list(released_sizes(2202)) == [845, 166, *[64] * 18, 39]
    assert list(released_sizes(5504))[:4] == [1024, 992, 240, 64]


def test_dynamic_sizes_shrink_from_1024_to_8():
    sizes = list(dynamic_sizes(5504))
    assert sum(sizes) == 5504
    assert (sizes[0], sizes[-2]) == (1024, 8)
    assert sizes == sorted(sizes, reverse=True)
    assert list(dynamic_sizes(40)) == [10, 8, 8, 8, 6]
    assert list(dynamic_sizes(3)) == [3]


def test_fixed_and_greedy_sizes():
    assert list(fixed_sizes(300)) == [128, 128, 44]
    assert list(greedy_sizes(257)) == [128, 128, 1]
    assert list(fixed_sizes(0)) == []


def test_finer_groups_leave_less_error():
    errors = dict.fromkeys(GROUPS, 0.0)
    for seed, share in itertools.product(range(4), (0.3, 0.6)):
        h, w = collinear(400, seed)
        problem = single(w, invert(h, 1e-4).matrix)
        for groups in GROUPS:
            chosen = choose_columns([problem], int(400 * share), groups)
            errors[groups] += (removal_error(problem, chosen) / ((w @ h) * w).sum()).item()
    assert errors["greedy"] <= errors["dynamic_group"] <= errors["fixed_group"]
    assert errors["dynamic_group"] < 0.5 * (errors["greedy"] + errors["fixed_group"])


@pytest.mark.parametrize("groups", GROUPS)
def test_float32_chooses_as_well_as_float64(groups):
    h, w = collinear(400, 5)
    single32 = single(w.bfloat16(), invert(h.float(), 1e-4).matrix)
    exact = single(single32.weight, invert(h, 1e-4).matrix)
    assert (single32.inverse.dtype, exact.inverse.dtype) == (torch.float32, torch.float64)
    mine, theirs = (choose_columns([p], 200, groups) for p in (single32, exact))
    assert len(set(mine) & set(theirs)) >= 196
    assert removal_error(exact, mine) <= 1.001 * removal_error(exact, theirs)
    assert removal_error(single32, mine).item() == pytest.approx(
        removal_error(exact, mine).item(), rel=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("groups", GROUPS)
def test_the_scale_of_the_hessian_does_not_matter(scale, dtype, groups):
    h, w = collinear(64, 3)
    h = h.to(dtype)
    chosen = [choose_columns([single(w, invert(h * s).matrix)], 40, groups) for s in (1, scale)]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_hardly_any_rank_is_still_a_choice(rank, dtype, groups):
    h = torch.zeros(40, 40, dtype=dtype)
    if rank:
        x = inputs(40, rank=rank)[0].to(dtype)
        h = x.T @ x / len(x)
    problem = single(inputs(40)[1], invert(h).matrix)
    for count in (1, 39, 40):
        assert len(set(choose_columns([problem], count, groups))) == count
        assert torch.isfinite(removal_error(problem, choose_columns([problem], count, groups)))


def test_consumers_in_float32_and_float64_together():
    cases = [collinear(64, seed) for seed in (1, 2)]
    double = [single(w, invert(h).matrix) for h, w in cases]
    (h, w), _ = cases
    mixed = [single(w, invert(h.float()).matrix), double[1]]
    assert [p.inverse.dtype for p in mixed] == [torch.float32, torch.float64]
    for groups in GROUPS:
        assert choose_columns(mixed, 30, groups) == choose_columns(double, 30, groups)
    assert choose_units(mixed, 30, "exact") == choose_columns(double, 30)
    assert swap(mixed, range(30)) == swap(double, range(30))


def test_of_two_equal_inputs_one_goes_for_nothing():
    x, w, _ = inputs(12)
    x[:, 7] = x[:, 2]
    problem = single(w, invert(x.T @ x / len(x)).matrix)
    assert choose_columns([problem], 1)[0] in (2, 7)


@pytest.mark.parametrize("consumers", [1, 2])
@pytest.mark.parametrize("groups", ["greedy", "fixed_group"])
def test_columns_on_one_more_copy_of_a(groups, consumers, monkeypatch):
    monkeypatch.setattr("prunekit.obs.choose.BLOCK", 8)
    monkeypatch.setattr("prunekit.obs.choose._FIXED", 8)
    n = 512
    problem = single(torch.randn(300, n), invert(torch.eye(n) + 0.1).matrix)
    assert problem.inverse.dtype == torch.float32
    assert (
        peak(lambda: choose_columns([problem] * consumers, 100, groups))
        < 1.4 * consumers * 4 * n * n
    )


def test_heads_on_one_more_copy_of_a_and_of_w_and_their_columns():
    n = 512
    problem = Problem(
        weight=torch.randn(64, n),
        inverse=invert(torch.eye(n) + 0.1).matrix,
        index=torch.arange(n).view(-1, 16),
    )
    assert peak(lambda: choose_units([problem], 5, "exact")) < 1.8 * 4 * n * n


def test_one_head_is_the_brute_force_choice_and_two_are_near_it():
    x, w, h = inputs(16, seed=3)
    problem = Problem(weight=w, inverse=invert(h).matrix, index=torch.arange(16).view(4, 4))

    def cost(units):
        kept = [i for i in range(16) if i // 4 not in units]
        return error(x, w, optimum(x, w, kept))

    assert choose_units([problem], 1, "exact") == [min(range(4), key=lambda u: cost([u]))]
    pairs = {pair: cost(pair) for pair in itertools.combinations(range(4), 2)}
    chosen = tuple(sorted(choose_units([problem], 2, "exact")))
    assert pairs[chosen] <= 1.5 * min(pairs.values())
    assert choose_units([problem], 2, "exact")[:1] == choose_units([problem], 1, "exact")


def naive_units(cases, count):
    """The unit that adds the least to the error of all that is gone, from H itself; cases of (H, W,
    index).
    """
    order = []
    for _ in range(count):
        rest = [u for u in range(len(cases[0][2])) if u not in order]
        order.append(
            min(
                rest,
                key=lambda u: sum(
                    left_error(h, w, index[[*order, u]].flatten().tolist()) for h, w, index in cases
                ),
            )
        )
    return order


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10_000), st.data())
def test_exact_units_of_any_consumers_one_after_another(units, width, consumers, seed, data):
    count = data.draw(st.integers(0, units))
    cases, problems = [], []
    for i in range(consumers):
        n = units * (width + i) + 2
        _, w, h = inputs(n, 4, 4 * n + 20, seed + i)
        index = torch.randperm(n, generator=torch.Generator().manual_seed(seed + i))[:-2].view(
            units, -1
        )
        cases.append((h, w, index))
        problems.append(Problem(weight=w, inverse=invert(h).matrix, index=index))
    before = [(p.weight.clone(), p.inverse.clone()) for p in problems]
    assert choose_units(problems, count, "exact") == naive_units(cases, count)
    for problem, (w, a) in zip(problems, before, strict=True):
        assert torch.equal(problem.weight, w)
        assert torch.equal(problem.inverse, a)


@pytest.mark.parametrize("score", ["exact", "grouped_cholesky", "diagonal"])
def test_units_wait_for_the_device_once_however_many_they_are(score):
    x, w, h = inputs(24)
    problem = Problem(weight=w, inverse=invert(h).matrix, index=torch.arange(24).view(8, 3))
    for count in (1, 3, 7):
        with Counting() as counting:
            order_units([problem] * 2, count, score, [])
        assert not counting.waited


def test_units_whose_blocks_have_no_factor_are_chosen_one_by_one():
    _, w, _ = inputs(12)
    a = torch.ones(12, 12) - 1e-6 * torch.eye(12)  # what rounding may make of two equal inputs
    problem = Problem(weight=w.float(), inverse=a, index=torch.arange(12).view(4, 3))
    failed = []
    order_units([problem], 2, "exact", failed)
    assert sum(failed) > 0
    assert choose_units([problem], 2, "exact") == order_units([problem], 2, "exact").tolist()


def heads(units, width, seed):
    """H and W where the inputs of a head share three quarters of their factors with one another
    alone.
    """
    generator = torch.Generator().manual_seed(seed)
    n = units * width

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own = torch.cat([normal(4 * n, 3) @ normal(3, width) / 3**0.5 for _ in range(units)], dim=1)
    x = own + normal(4 * n, units) @ normal(units, n) / units**0.5 + 0.3 * normal(4 * n, n)
    x *= normal(units).mul(0.5).exp().repeat_interleave(width)
    return x.T @ x / len(x), normal(n // 3, n)


def test_exact_heads_leave_less_error_than_the_papers_and_those_less_than_the_diagonals():
    errors = dict.fromkeys(("exact", "grouped_cholesky", "diagonal"), 0.0)
    for seed in range(30):
        h, w = heads(12, 8, seed)
        problem = Problem(weight=w, inverse=invert(h).matrix, index=torch.arange(96).view(12, 8))
        for score in errors:
            chosen = choose_units([problem], 5, score)
            errors[score] += (removal_error(problem, chosen) / ((w @ h) * w).sum()).item()
    assert errors["exact"] < errors["grouped_cholesky"] < errors["diagonal"]


@pytest.mark.parametrize("score", ["exact", "grouped_cholesky", "diagonal"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_unit_all_units_and_all_but_one(score, rank):
    h = inputs(12, rank=1)[2] * rank
    for units in (1, 3):
        index = torch.arange(12).view(units, -1)
        problem = Problem(weight=inputs(12)[1], inverse=invert(h).matrix, index=index)
        assert choose_units([problem], 0, score) == []
        for count in {1, units - 1, units}:
            assert len(set(choose_units([problem], count, score))) == count
