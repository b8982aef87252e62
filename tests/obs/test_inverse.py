import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import collinear, error, inputs, loss, optimum, peak

from prunekit.calibration.moments import Moments
from prunekit.errors import DataError
from prunekit.obs.inverse import (
    Problem,
    added_errors,
    cholesky,
    invert,
    removal_error,
    remove_columns,
    unit_errors,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(1, 8), st.integers(0, 10_000), st.data())
def test_removal_in_steps_reaches_the_least_squares_optimum(n, d, seed, data):
    x, w, h = inputs(n, d, 4 * n + 20, seed)
    removed = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n - 1, unique=True))
    kept = [i for i in range(n) if i not in removed]
    result = remove_columns(w, invert(h).matrix, torch.tensor(removed))
    torch.testing.assert_close(result, optimum(x, w, kept), rtol=1e-6, atol=1e-8)
    assert not result[:, removed].any()


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_rank_deficient_hessian_reaches_the_optimal_error(rank):
    x, w, h = inputs(rank=rank)
    inverse = invert(h)
    assert 0 < inverse.damping < 1e-6, "damped, but hardly"
    removed = torch.arange(0, 24, 2)
    kept = [i for i in range(24) if i % 2]
    best = error(x, w, optimum(x, w, kept))
    assert error(x, w, remove_columns(w, inverse.matrix, removed)) <= best + 1e-6 * error(
        x, w, torch.zeros_like(w)
    )


@pytest.mark.parametrize("width", [1, 3, 4])
def test_exact_unit_errors_are_the_optimal_errors(width):
    x, w, h = inputs(12)
    index = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(-1, width)
    problem = Problem(weight=w, inverse=invert(h).matrix, index=index)
    errors = unit_errors([problem], "exact")
    for unit, columns in enumerate(index):
        kept = [i for i in range(12) if i not in columns.tolist()]
        assert errors[unit].item() == pytest.approx(error(x, w, optimum(x, w, kept)), rel=1e-6)
        assert removal_error(problem, [unit]).item() == pytest.approx(errors[unit].item())
    torch.testing.assert_close(unit_errors([problem, problem], "exact"), 2 * errors)


@pytest.mark.parametrize("width", [1, 3])
def test_units_add_what_the_optimal_error_rises_by(width):
    x, w, h = inputs(12)
    index = torch.randperm(12, generator=torch.Generator().manual_seed(1)).view(-1, width)
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(2)).tolist()
    added = added_errors(Problem(weight=w, inverse=invert(h).matrix, index=index), order[:3])
    assert removal_error(Problem(weight=w, inverse=invert(h).matrix, index=index), []) == 0
    for k in range(3):
        gone = index[order[: k + 1]].flatten().tolist()
        kept = [i for i in range(12) if i not in gone]
        assert added[: k + 1].sum().item() == pytest.approx(error(x, w, optimum(x, w, kept)))


def test_grouped_cholesky_and_diagonal_by_their_definitions():
    _, w, h = inputs(8)
    a, index = invert(h).matrix, torch.arange(8).view(2, 4)
    problem = Problem(weight=w, inverse=a, index=index)
    for unit, columns in enumerate(index):
        block = a[columns][:, columns]
        factor = torch.linalg.cholesky(block)
        grouped = sum(w[:, c].square().sum() / factor[j, j] ** 2 for j, c in enumerate(columns))
        diagonal = sum(w[:, c].square().sum() / a[c, c] for c in columns)
        assert unit_errors([problem], "grouped_cholesky")[unit] == pytest.approx(grouped.item())
        assert unit_errors([problem], "diagonal")[unit] == pytest.approx(diagonal.item())


@pytest.mark.parametrize("weak", [0, 1e-30])
def test_dead_inputs_cost_nothing_and_keep_their_weights(weak):
    x, w, _ = inputs(10)
    x[:, [2, 5]] *= weak
    inverse = invert(x.T @ x / len(x))
    assert inverse.dead.nonzero().flatten().tolist() == [2, 5]
    alive = Problem(
        weight=w.masked_fill(inverse.dead, 0),
        inverse=inverse.matrix,
        index=torch.arange(10)[:, None],
    )
    assert unit_errors([alive], "exact")[[2, 5]].tolist() == [0, 0]
    kept = remove_columns(w, inverse.matrix, torch.tensor([2]))
    torch.testing.assert_close(
        kept[:, [i for i in range(10) if i != 2]], w[:, [i for i in range(10) if i != 2]]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_inputs_dead(dtype):
    inverse = invert(torch.zeros(4, 4, dtype=dtype))
    assert inverse.dead.all()
    assert torch.equal(inverse.matrix, torch.eye(4, dtype=dtype))
    assert inverse.damping == 0


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(0, 10_000),
    st.floats(-30, 30),
    st.floats(0, 8),
    st.floats(0, 0.1),
)
def test_whatever_the_scales_of_the_inputs_the_inverse_is_one(n, seed, scale, spread, damping):
    x, _, _ = inputs(n, tokens=20 * n, seed=seed)
    scales = torch.logspace(0, -spread / 2, n, dtype=torch.float64)
    h = (scales[:, None] * (x.T @ x / len(x)) * scales).float().double()
    a = invert((h * 10.0**scale).float(), damping)
    assert torch.isfinite(a.matrix).all()
    assert a.damping <= max(damping, 1e-6)
    damped = h + a.damping * h.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    root = damped.diagonal().sqrt()
    scaled = a.matrix.double() * 10.0**scale * root[:, None] * root
    product = scaled @ (damped / root[:, None] / root)
    inflation = scaled.diagonal().max().item()
    torch.testing.assert_close(
        product, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-6 * n * inflation
    )


@pytest.mark.parametrize("noise", [1.0, 0.1, 0.03, 0.01, 1e-3])
def test_float32_where_the_error_it_leaves_is_the_least_and_float64_elsewhere(noise):
    h, w = collinear(128, 2, noise)
    h = h.float().double()
    inverse = invert(h.float())
    inflation = (torch.linalg.inv(h).diagonal() * h.diagonal()).max().item()
    assert inverse.matrix.dtype == (torch.float32 if inflation < 1e4 else torch.float64), inflation
    removed = torch.arange(0, 128, 2)
    mine, best = (
        loss(h, w, remove_columns(w, a, removed)) for a in (inverse.matrix, invert(h).matrix)
    )
    assert best <= mine * (1 + 1e-9)
    assert mine <= best * (1 + 1e-4)
    assert invert(h).matrix.dtype == torch.float64


def test_one_weak_input_beside_a_huge_one_is_removed_as_any_other():
    x, w, _ = inputs(6)
    x[:, 0] *= 1e6
    x[:, 1] *= 1e-3
    h = (x.T @ x / len(x)).float()
    inverse = invert(h)
    assert inverse.matrix.dtype == torch.float32
    result = remove_columns(w, inverse.matrix, torch.tensor([3]))
    torch.testing.assert_close(
        result.double(), optimum(x, w, [0, 1, 2, 4, 5]), rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("rank", [1, 5])
def test_float32_moments_without_full_rank(rank):
    x, w, h = inputs(24, rank=rank)
    inverse = invert(h.float())
    assert 0 < inverse.damping < 1e-4
    removed = torch.arange(0, 24, 2)
    best = error(x, w, optimum(x, w, list(range(1, 24, 2))))
    assert error(x, w, remove_columns(w, inverse.matrix, removed)) <= best + 1e-4 * error(
        x, w, torch.zeros_like(w)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverting_takes_two_copies(dtype):
    n = 512
    h = (torch.eye(n) + 0.1).to(dtype)
    assert invert(h).matrix.dtype == dtype
    assert peak(lambda: invert(h, 1e-3)) < 2.1 * h.element_size() * n * n
    ill = torch.full((n, n), 1.0) + 1e-6 * torch.eye(n)
    assert invert(ill).matrix.dtype == torch.float64
    assert peak(lambda: invert(ill)) < 2.1 * 8 * n * n


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3.0])
def test_what_is_no_second_moment_is_an_error(bad):
    h = torch.eye(3)
    h[0, 1] = h[1, 0] = bad
    with pytest.raises(DataError, match="expected finite second moments"):
        invert(h)
    h[0, 0] = float("nan")
    with pytest.raises(DataError, match="expected finite second moments"):
        invert(h.double())


def test_blocks_that_rounding_made_indefinite_still_have_a_factor():
    blocks = torch.stack([torch.eye(3), torch.ones(3, 3) - 1e-6 * torch.eye(3)])
    factors = cholesky(blocks)
    assert torch.isfinite(factors).all()
    torch.testing.assert_close(factors @ factors.mT, blocks, rtol=0, atol=1e-4)


def test_moments_are_the_mean_over_tokens_whatever_the_batches():
    x = torch.randn(5, 7, 6)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[3, 2:] = False
    moments = Moments(6, "here")
    for row, keep in zip(x, mask, strict=True):
        moments.add(row[None, keep])
    flat = x[mask].double()
    torch.testing.assert_close(
        moments.hessian.double(), flat.T @ flat / len(flat), rtol=1e-5, atol=1e-6
    )
    assert moments.tokens == int(mask.sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_among_the_inputs_is_an_error_with_the_layers_name(bad):
    x = torch.randn(2, 3, 4)
    x[1, 1, 1] = bad
    moments = Moments(4, "layers.1.o_proj")
    moments.add(x, samples=[6, 7])
    moments.add(x[:1], samples=[8])
    with pytest.raises(DataError, match=r"layers\.1\.o_proj.*NaN or infinity in .*sample 7"):
        moments.check()
