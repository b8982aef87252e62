import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.compensation.hessian import Moments
from prunekit.compensation.solver import invert, remove_columns, unit_errors
from prunekit.errors import DataError


def problem(n=24, d=10, tokens=200, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, rank or n, generator=generator, dtype=torch.float64) @ mix
    w = torch.randn(d, n, generator=generator, dtype=torch.float64)
    return x, w, x.T @ x / tokens


def error(x, before, after):
    return ((x @ (after - before).T) ** 2).sum().item() / len(x)


def optimum(x, w, kept):
    """The least-squares optimum by an independent solver: min over V of ‖x[:, kept] Vᵀ − x wᵀ‖."""
    full = torch.zeros_like(w)
    full[:, kept] = torch.linalg.lstsq(x[:, kept], x @ w.T, driver="gelsd").solution.T
    return full


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 8), st.integers(0, 10_000), st.data())
def test_removal_in_steps_reaches_the_least_squares_optimum(n, d, seed, data):
    x, w, h = problem(n, d, 4 * n + 20, seed)
    removed = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n - 1, unique=True))
    kept = [i for i in range(n) if i not in removed]
    result = remove_columns(w, invert(h).matrix, torch.tensor(removed))
    torch.testing.assert_close(result, optimum(x, w, kept), rtol=1e-6, atol=1e-8)
    assert not result[:, removed].any()


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_rank_deficient_hessian_reaches_the_optimal_error(rank):
    x, w, h = problem(rank=rank)
    inverse = invert(h)
    assert 0 < inverse.damping < 1e-6, "damped, but hardly"
    removed = torch.arange(0, 24, 2)
    kept = [i for i in range(24) if i % 2]
    best = error(x, w, optimum(x, w, kept))
    assert error(x, w, remove_columns(w, inverse.matrix, removed)) <= best + 1e-6 * error(x, w, torch.zeros_like(w))


def naive_columns(w, a, count):
    w, a, order = w.clone(), a.clone(), []
    for _ in range(count):
        scores = w.square().sum(0) / a.diagonal()
        scores[order] = torch.inf
        p = int(scores.argmin())
        order.append(p)
        w, a = w - torch.outer(w[:, p], a[p]) / a[p, p], a - torch.outer(a[:, p], a[p]) / a[p, p]
    return order


@pytest.mark.parametrize(("n", "count"), [(24, 23), (200, 150), (300, 64), (300, 65)])
def test_greedy_columns_are_those_of_the_naive_loop(n, count):
    _, w, h = problem(n, 16, 3 * n, seed=n)
    a = invert(h, 1e-4).matrix
    assert choose_columns(w, a, count) == naive_columns(w, a, count)


@pytest.mark.parametrize("width", [1, 3, 4])
def test_exact_unit_errors_are_the_optimal_errors(width):
    x, w, h = problem(12)
    index = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(-1, width)
    errors = unit_errors(w, invert(h).matrix, index, "exact")
    for unit, columns in enumerate(index):
        kept = [i for i in range(12) if i not in columns.tolist()]
        assert errors[unit].item() == pytest.approx(error(x, w, optimum(x, w, kept)), rel=1e-6)


def test_one_head_is_the_brute_force_choice_and_two_are_near_it():
    x, w, h = problem(16, seed=3)
    index = torch.arange(16).view(4, 4)
    a = invert(h).matrix

    def cost(units):
        kept = [i for i in range(16) if i // 4 not in units]
        return error(x, w, optimum(x, w, kept))

    assert choose_units(w, a, index, 1, "exact") == [min(range(4), key=lambda u: cost([u]))]
    pairs = {pair: cost(pair) for pair in itertools.combinations(range(4), 2)}
    chosen = tuple(sorted(choose_units(w, a, index, 2, "exact")))
    assert pairs[chosen] <= 1.5 * min(pairs.values())
    assert choose_units(w, a, index, 2, "exact")[:1] == choose_units(w, a, index, 1, "exact")


def test_grouped_cholesky_and_diagonal_by_their_definitions():
    _, w, h = problem(8)
    a, index = invert(h).matrix, torch.arange(8).view(2, 4)
    for unit, columns in enumerate(index):
        block = a[columns][:, columns]
        factor = torch.linalg.cholesky(block)
        grouped = sum(w[:, c].square().sum() / factor[j, j] ** 2 for j, c in enumerate(columns))
        diagonal = sum(w[:, c].square().sum() / a[c, c] for c in columns)
        assert unit_errors(w, a, index, "grouped_cholesky")[unit] == pytest.approx(grouped.item())
        assert unit_errors(w, a, index, "diagonal")[unit] == pytest.approx(diagonal.item())


def test_dead_inputs_cost_nothing_and_keep_their_weights():
    x, w, _ = problem(10)
    x[:, [2, 5]] = 0
    inverse = invert(x.T @ x / len(x))
    assert inverse.dead.nonzero().flatten().tolist() == [2, 5]
    alive = w.masked_fill(inverse.dead, 0)
    assert sorted(choose_columns(alive, inverse.matrix, 2)) == [2, 5]
    kept = remove_columns(w, inverse.matrix, torch.tensor([2]))
    torch.testing.assert_close(kept[:, [i for i in range(10) if i != 2]], w[:, [i for i in range(10) if i != 2]])


def test_all_inputs_dead():
    inverse = invert(torch.zeros(4, 4))
    assert inverse.dead.all()
    assert torch.isfinite(inverse.matrix).all()


def test_moments_are_the_mean_over_tokens_whatever_the_batches():
    x = torch.randn(5, 7, 6)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[3, 2:] = False
    moments = Moments(6, "here")
    for row, keep in zip(x, mask, strict=True):
        moments.add(row[None], keep[None])
    flat = x[mask].double()
    torch.testing.assert_close(moments.hessian.double(), flat.T @ flat / len(flat), rtol=1e-5, atol=1e-6)
    assert moments.tokens == int(mask.sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_among_the_inputs_is_an_error_with_the_layers_name(bad):
    x = torch.randn(2, 3, 4)
    x[1, 1, 1] = bad
    with pytest.raises(DataError, match=r"layers\.1\.o_proj.*NaN or infinity"):
        Moments(4, "layers.1.o_proj").add(x)
