"""One set of checks for every compensation, also for one that is defined outside the package."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import prunekit
from prunekit.calibration.consumers import Consumer
from prunekit.calibration.moments import Moments
from prunekit.calibration.observe import Site
from prunekit.calibration.statistics import prepare_site
from prunekit.compensation import Bias, Compensation, Obs
from prunekit.errors import ConfigError
from prunekit.graph import Member

INPUTS, OUTPUTS, TOKENS = 12, 5, 400
REMOVED = torch.tensor([1, 4, 10])
KEPT = [i for i in range(INPUTS) if i not in REMOVED.tolist()]


@dataclass(frozen=True, kw_only=True)
class Rescale(Compensation):
    """A compensation of a user's: the weights that stay make up for the norm of those that go."""

    needs_inverse: ClassVar[bool] = False

    def repair(self, weight, statistics, removed):
        """Scale W to its norm before."""
        repaired = weight.index_fill(1, removed, 0)
        return repaired * (weight.norm() / repaired.norm()), None


COMPENSATIONS = {
    "bias": Bias(),
    "obs": Obs(),
    "obs, pruned": Obs(target="pruned"),
    "obs, biases": Obs(bias=True),
    "a user's": Rescale(),
}
by_compensation = pytest.mark.parametrize("name", COMPENSATIONS)


def draw_inputs(dtype=torch.float32):
    """Inputs [tokens, n] that depend on one another and have a mean."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(TOKENS, INPUTS, generator=generator, dtype=torch.float64)
    mixed = mixed @ torch.randn(INPUTS, INPUTS, generator=generator, dtype=torch.float64)
    return (mixed + torch.linspace(-2, 2, INPUTS, dtype=torch.float64)).to(dtype)


def make_site(x, bias=True, dtype=torch.float32):
    """A linear layer as the only consumer of its inputs [tokens, n]."""
    torch.manual_seed(1)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)
    index = torch.arange(INPUTS)[:, None]
    member = Member(parameter="linear.weight", dim=1, role="consumer", index=index)
    moments = Moments(INPUTS, "linear", dtype=x.dtype)
    moments.add(x)
    moments.finish()
    return Site([Consumer(module=linear, member=member, name="linear")], moments)


def repair(compensation, site):
    """W [d, n] before; W and the bias after."""
    work = prepare_site(
        site,
        0.0,
        centred=compensation.centred(site),
        inverted=compensation.needs_inverse,
    )
    return work.weight, *compensation.repair(work.weight, work.statistics, REMOVED)


@by_compensation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_columns_that_go_are_zero_and_shapes_stay(name, dtype, bias):
    site = make_site(draw_inputs(dtype), bias, dtype)
    before = site.weight().clone()
    weight, repaired, added = repair(COMPENSATIONS[name], site)
    assert torch.equal(weight, before)
    assert repaired.shape == weight.shape
    assert repaired.dtype in (torch.float32, torch.float64)
    assert (repaired[:, REMOVED] == 0).all()
    assert (repaired[:, KEPT] != 0).any()
    assert torch.isfinite(repaired).all()
    if added is not None:
        assert added.shape == (OUTPUTS,)
        assert torch.isfinite(added).all()
    (consumer,) = site.consumers
    consumer.store(repaired, added)
    assert consumer.parameter.dtype == dtype
    assert (consumer.weight()[:, REMOVED] == 0).all()


@by_compensation
def test_only_a_compensation_that_says_so_adds_biases(name):
    compensation = COMPENSATIONS[name]
    _, _, added = repair(compensation, make_site(draw_inputs(), bias=False))
    assert (added is not None) == compensation.adds_biases


@by_compensation
def test_the_same_again(name):
    _, *one = repair(COMPENSATIONS[name], make_site(draw_inputs()))
    _, *two = repair(COMPENSATIONS[name], make_site(draw_inputs()))
    assert torch.equal(one[0], two[0])
    assert (one[1] is None and two[1] is None) or torch.equal(one[1], two[1])


@by_compensation
def test_the_inverse_is_there_for_those_alone_that_need_it(name):
    compensation = COMPENSATIONS[name]
    site = make_site(draw_inputs())
    work = prepare_site(site, 0.0, centred=False, inverted=compensation.needs_inverse)
    assert (work.statistics.inverse is not None) == compensation.needs_inverse
    assert all(
        compensation.target_of(kind) in ("pruned", "dense", "residual")
        for kind in ("attention", "query_head", "mlp", "channel", "expert")
    )


@by_compensation
def test_a_whole_run_gives_the_same_model_twice(name):
    layers = [nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2)]
    torch.manual_seed(0)
    dense, x = nn.Sequential(*layers), torch.randn(80, 10)
    models = []
    for _ in range(2):
        model = copy.deepcopy(dense)
        prunekit.prune(
            model,
            ratio=0.4,
            calibration=[{"input": part} for part in x.split(20)],
            compensation=COMPENSATIONS[name],
            overrides=["policy=uniform"],
        )
        models.append(model)
    assert torch.isfinite(models[0](x)).all()
    assert sum(p.numel() for p in models[0].parameters()) < sum(
        p.numel() for p in dense.parameters()
    )
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("bias", [True, False])
def test_obs_is_the_least_squares_optimum(bias):
    """Against the (affine) least squares on the columns that stay, in float64."""
    x = draw_inputs(torch.float64)
    site = make_site(x, bias=True, dtype=torch.float64)
    weight, repaired, added = repair(Obs(bias=bias), site)
    regressors = torch.cat([x[:, KEPT], torch.ones(TOKENS, 1, dtype=x.dtype)], 1)
    regressors = regressors if bias else x[:, KEPT]
    solution = torch.linalg.lstsq(regressors, x @ weight.T).solution.T
    optimum = solution[:, : len(KEPT)]
    torch.testing.assert_close(repaired[:, KEPT], optimum, rtol=1e-6, atol=1e-8)
    if bias:
        torch.testing.assert_close(added, solution[:, -1], rtol=1e-6, atol=1e-8)
    else:
        assert added is None


def test_biases_keep_the_mean_of_the_outputs():
    x = draw_inputs(torch.float64)
    weight, repaired, added = repair(Bias(), make_site(x, dtype=torch.float64))
    torch.testing.assert_close((x @ repaired.T + added).mean(0), (x @ weight.T).mean(0))
    torch.testing.assert_close(repaired[:, KEPT], weight[:, KEPT], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target": "dens"}, r"compensation.target: unknown 'dens': did you mean dense\?"),
        ({"target": None}, "compensation.target: unknown None"),
        ({"attention": "x"}, "compensation.attention: unknown 'x'"),
        ({"mlp": 3}, "compensation.mlp: unknown 3"),
        ({"bias": "yes"}, "compensation.bias: expected true or false, got 'yes'"),
    ],
)
def test_options_that_obs_refuses(options, match):
    with pytest.raises(ConfigError, match=match):
        Obs(**options)
