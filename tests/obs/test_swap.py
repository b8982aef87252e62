import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import collinear, inputs, left_error, peak, single

from prunekit.obs.choose import choose_columns, choose_units
from prunekit.obs.inverse import Problem, invert, removal_error
from prunekit.obs.swap import _Swept, swap


def cases(units, width, consumers, seed):
    found = []
    for i in range(consumers):
        n = units * (width + i) + 1
        _, w, h = inputs(n, 4, 4 * n + 20, seed + i)
        index = torch.randperm(n, generator=torch.Generator().manual_seed(seed + i))[:-1].view(
            units, -1
        )
        found.append((h, w, index))
    return found, [
        Problem(weight=w, inverse=invert(h).matrix, index=index) for h, w, index in found
    ]


def left(found, units):
    return sum(left_error(h, w, index[units].flatten().tolist()) for h, w, index in found)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(1, 2), st.integers(0, 10_000), st.data())
def test_no_exchange_would_lower_the_error_any_more(units, width, consumers, seed, data):
    removed = data.draw(
        st.lists(st.integers(0, units - 1), min_size=1, max_size=units - 1, unique=True)
    )
    found, problems = cases(units, width, consumers, seed)
    chosen = swap(problems, removed)
    assert len(set(chosen)) == len(removed)
    least = left(found, chosen)
    assert least <= left(found, removed) * (1 + 1e-9)
    for i, q in itertools.product(range(len(chosen)), set(range(units)) - set(chosen)):
        assert left(found, [*chosen[:i], q, *chosen[i + 1 :]]) >= least * (1 - 1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 10_000), st.data())
def test_the_changes_are_those_of_the_exact_error_after_exchanges_too(units, width, seed, data):
    order = data.draw(st.permutations(range(units)))
    removed = order[: data.draw(st.integers(1, units - 1))]
    ((h, _, _),), (problem,) = cases(units, width, 1, seed)
    digits = 1e-12 * max(
        torch.linalg.cond(h).item(), 100
    )  # what sweeping to and fro may lose of the larger error
    swept = _Swept(problem)
    swept.sweep(torch.tensor(removed), 1)
    for _ in range(3):
        kept = [u for u in range(units) if u not in removed]
        changes = swept.changes(torch.tensor(removed), torch.tensor(kept))
        now = removal_error(problem, removed)
        for (i, p), (j, q) in itertools.product(enumerate(removed), enumerate(kept)):
            after = removal_error(problem, [q, *(u for u in removed if u != p)])
            allowed = digits * max(now.item(), after.item())
            assert changes[i, j].item() == pytest.approx((after - now).item(), rel=0, abs=allowed)
        swept.sweep(torch.tensor(removed[:1]), -1)
        swept.sweep(torch.tensor(kept[:1]), 1)
        removed = [*removed[1:], kept[0]]


@pytest.mark.parametrize("width", [1, 2])
def test_swaps_come_near_the_best_subset(width):
    ratios = []
    for seed in range(12):
        h, w = collinear(12 * width, seed, noise=0.1)
        w = w[:4]
        problem = Problem(
            weight=w, inverse=invert(h).matrix, index=torch.arange(12 * width).view(12, width)
        )
        subsets = itertools.combinations(range(12), 6)
        best = min(removal_error(problem, subset).item() for subset in subsets)
        greedy = choose_columns([problem], 6) if width == 1 else choose_units([problem], 6, "exact")
        found = [
            removal_error(problem, chosen).item() / best
            for chosen in (greedy, swap([problem], greedy))
        ]
        assert 1 - 1e-6 <= found[1] <= found[0] * (1 + 1e-9)
        ratios.append(found)
    greedy, swapped = torch.tensor(ratios).mean(0).tolist()
    assert swapped < 1.002 < 1.01 < greedy


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_swap_in_float32_lowers_the_exact_error_whatever_the_chunks(chunk, monkeypatch):
    monkeypatch.setattr("prunekit.obs.swap._CHUNK", chunk)
    h, w = collinear(96, 1)
    mine, exact = (single(w, invert(hessian, 1e-4).matrix) for hessian in (h.float(), h))
    assert mine.inverse.dtype == torch.float32
    greedy = choose_columns([mine], 48, "fixed_group")
    swapped = swap([mine], greedy)
    assert removal_error(exact, swapped) < 0.99 * removal_error(exact, greedy)


def test_swaps_on_two_more_copies_of_a(monkeypatch):
    monkeypatch.setattr("prunekit.obs.swap._CHUNK", 1000)
    monkeypatch.setattr("prunekit.obs.swap._BLOCK", 8)
    n = 256
    problem = single(torch.randn(16, n), invert(torch.eye(n) + 0.1).matrix)
    assert problem.inverse.dtype == torch.float32
    assert peak(lambda: swap([problem], range(0, n, 2))) < 2.4 * 4 * n * n


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("rank", [0, 1])
def test_swaps_of_nothing_of_all_and_without_rank(rank, width):
    h = inputs(12, rank=1)[2].float() * rank
    problem = Problem(
        weight=inputs(12)[1], inverse=invert(h).matrix, index=torch.arange(12).view(-1, width)
    )
    units = 12 // width
    assert swap([problem], []) == []
    assert swap([problem], range(units)) == list(range(units))
    assert len(set(swap([problem], range(units - 1)))) == units - 1
    one = Problem(weight=problem.weight, inverse=problem.inverse, index=torch.arange(12)[None])
    assert swap([one], [0]) == [0]
