"""What a layer must reproduce: least squares towards another target, as far as held-out samples
bear it out.
"""

import gc

import pytest
import torch
from conftest import inputs_of, tiny_llama, token_ids
from families import FIRST, build
from operations import Counting

import prunekit
from prunekit.calibration import statistics, stream, targets
from prunekit.calibration.consumers import Consumer
from prunekit.calibration.layer_pass import LayerPass
from prunekit.calibration.moments import Moments
from prunekit.calibration.observe import Site, runs_of_rows
from prunekit.calibration.statistics import measure_share, prepare_site
from prunekit.compensation.obs import Obs
from prunekit.errors import ConfigError
from prunekit.graph import Member
from prunekit.obs.inverse import invert, solve


def site(x, errors, weight, bias=None):
    """A linear layer's inputs [tokens, n] and what its outputs lack; every eighth token is held
    out.
    """
    linear = torch.nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    linear.weight.data = weight.clone()
    if bias is not None:
        linear.bias.data = bias.clone()
    index = torch.arange(weight.shape[1])[:, None]
    member = Member(parameter="linear.weight", dim=1, role="consumer", index=index)
    consumer = Consumer(module=linear, member=member, name="linear")
    moments = [Moments(x.shape[1], "linear", outputs=len(weight)) for _ in range(2)]
    held = torch.arange(len(x)) % 8 == 7
    moments[0].add(x[~held], errors[~held])
    moments[1].add(x[held], errors[held])
    for part in moments:
        part.finish()
    return Site([consumer], moments[0], moments[1])


def take_step(place, centred=False):
    """Move a site's weight towards its target: (weight, share, statistics)."""
    work = prepare_site(place, 0.0, centred=centred, inverted=True)
    return work.weight, work.share, work.statistics


def drawn(tokens, n=12, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator)
    return (
        torch.randn(tokens, n, generator=generator) @ mix,
        torch.randn(d, n, generator=generator),
        generator,
    )


def test_a_target_that_is_linear_is_met():
    x, weight, generator = drawn(4000)
    wanted = torch.randn(weight.shape, generator=generator)
    place = site(x, x @ (wanted - weight).T, weight)
    moved, share, known = take_step(place)
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-3)
    assert share == pytest.approx(1, abs=1e-3)
    assert place.held is None
    assert known.moments.tokens == 4000


def test_noise_is_not_followed():
    x, weight, generator = drawn(40)
    noise = 10 * torch.randn(40, len(weight), generator=generator)
    moved, share, _ = take_step(site(x, noise, weight))
    free = torch.linalg.lstsq(x, noise).solution.norm()
    assert share < 0.5
    assert (moved - weight).norm() < 0.5 * free


def test_the_share_is_the_best_on_what_was_held_out():
    x, weight, generator = drawn(160)
    true = 0.3 * torch.randn(weight.shape, generator=generator)
    errors = x @ true.T + 4 * torch.randn(160, len(weight), generator=generator)
    place = site(x, errors, weight)
    share = measure_share(place.moments, place.held, 0.0, centred=False)
    held = torch.arange(160) % 8 == 7
    step = torch.linalg.lstsq(x[~held], errors[~held]).solution.T

    def loss(part):
        return (errors[held] - part * x[held] @ step.T).square().sum().item()

    best = min((k / 1000 for k in range(1001)), key=loss)
    assert share == pytest.approx(best, abs=2e-3)
    assert 0 < share < 1
    assert place.held.tokens == 20  # nothing is merged or let go of behind the caller's back


def test_held_out_moments_are_let_go_of_before_the_inversion(monkeypatch):
    """Peak memory depends on how many matrices [n, n] are alive when moments are factorised."""
    x, weight, _ = drawn(160, n=37)
    place = site(x, torch.zeros(160, len(weight)), weight)
    alive = []

    def counted(function):
        def count(hessian, *rest):
            gc.collect()
            tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
            alive.append(sum(tensor.shape == (37, 37) for tensor in tensors))
            return function(hessian, *rest)

        return count

    monkeypatch.setattr(statistics, "solve", counted(solve))
    monkeypatch.setattr(statistics, "invert", counted(invert))
    take_step(place)
    assert alive == [2, 1]


def test_a_bias_takes_up_the_mean():
    """Against the affine least squares on the columns that stay."""
    x, weight, _ = drawn(3000)
    x += torch.linspace(-3, 3, 12)
    bias = torch.zeros(len(weight))
    place = site(x, torch.zeros(3000, len(weight)), weight, bias)
    place.merge_held_out()
    repairs = Obs(bias=True)
    assert repairs.centred(place)
    _, share, known = take_step(place, centred=True)
    assert share == 0  # nothing is held out: there is no target
    removed = torch.tensor([0, 3, 7])
    repaired, added = repairs.repair(weight, known, removed)
    kept = [i for i in range(12) if i not in removed.tolist()]
    augmented = torch.cat([x[:, kept], torch.ones(3000, 1)], 1).double()
    solution = torch.linalg.lstsq(augmented, (x @ weight.T).double()).solution.T
    torch.testing.assert_close(repaired[:, kept].double(), solution[:, :-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(added.double(), solution[:, -1], rtol=1e-2, atol=1e-2)
    assert not Obs().centred(place)


def test_a_target_with_biases_is_met_by_both():
    x, weight, generator = drawn(4000)
    x += torch.linspace(-3, 3, 12)
    wanted, constant = (
        torch.randn(weight.shape, generator=generator),
        torch.randn(len(weight), generator=generator),
    )
    place = site(x, x @ (wanted - weight).T + constant, weight, torch.zeros(len(weight)))
    moved, _, known = take_step(place, centred=True)
    torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=1e-3)
    repaired, bias = Obs(bias=True).repair(moved, known, torch.tensor([1, 4]))
    kept = [i for i in range(12) if i not in (1, 4)]
    augmented = torch.cat([x[:, kept], torch.ones(4000, 1)], 1).double()
    solution = torch.linalg.lstsq(augmented, (x @ wanted.T + constant).double()).solution.T
    torch.testing.assert_close(repaired[:, kept].double(), solution[:, :-1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(bias.double(), solution[:, -1], rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_the_residual_target_brings_the_stream_nearer_to_the_dense_one(family):
    calibration, fresh, errors = token_ids(200, 24), token_ids(40, 24, seed=1), {}
    name = {"gpt2": "lm_head", "gpt_neox": "embed_out", "llama": "lm_head"}[family]
    for target in ("pruned", "residual"):
        model = build(family, FIRST[family], "sdpa", "eager")
        name = name if name in dict(model.named_modules()) else "lm_head"
        before = inputs_of(model, name, fresh)
        options = [f"compensation.target={target}", "policy=uniform"]
        prunekit.prune(model, ratio=0.2, calibration=calibration, overrides=options)
        errors[target] = (inputs_of(model, name, fresh) - before).square().mean().item()
    assert errors["residual"] < errors["pruned"]


def test_where_the_residual_target_does_not_exist_the_next_best_is_taken(monkeypatch):
    said = []
    monkeypatch.setattr("prunekit.calibration.stream.say", said.append)
    model = build(
        "gemma2", FIRST["gemma2"], "sdpa", "eager"
    )  # a norm lies between the block and the addition
    prunekit.prune(
        model,
        calibration=token_ids(16, 12),
        overrides=["compensation.target=residual", "policy=uniform"],
    )
    assert all("target=dense is taken" in line for line in said)
    assert said
    said.clear()
    granite = build("granite", FIRST["granite"], "sdpa")
    granite.config.residual_multiplier = 0.5
    for layer in granite.model.layers:
        layer.residual_multiplier = 0.95  # what is added is not what the consumer gives
    granite.model.embed_tokens.weight.data[:, 3] *= (
        1e3  # massive activations hide small differences
    )
    prunekit.prune(granite, calibration=token_ids(16, 12), overrides=["policy=uniform"])
    assert "target=dense is taken" in said[0]
    said.clear()
    prunekit.prune(tiny_llama(), calibration=token_ids(4), overrides=["compensation.target=dense"])
    assert "too few to hold some out" in said[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_residual_target_exists_beside_groups_that_stay_whole(family, monkeypatch):
    said = []
    monkeypatch.setattr("prunekit.calibration.stream.say", said.append)
    prunekit.prune(
        build(family, FIRST[family], "sdpa", "eager"),
        ratio=0.1,
        calibration=token_ids(16, 12),
        overrides=["compensation.target=residual", "policy=uniform", "groups=attention"],
    )
    assert said == []


def test_targets_by_kind_and_unknown_ones():
    repairs = Obs(target="pruned", attention="residual")
    assert [repairs.target_of(kind) for kind in ("attention", "query_head", "mlp")] == [
        "residual"
    ] * 2 + ["pruned"]
    with pytest.raises(
        ConfigError, match=r"compensation.mlp: unknown 'dens': did you mean dense\?"
    ):
        Obs(mlp="dens")


def test_rows_are_taken_without_their_numbers_going_to_the_device():
    tensor = torch.arange(40).view(10, 4)
    for rows in ([], [0], [9], [0, 1, 2], [1, 3, 4, 8], list(range(10))):
        with Counting() as counting:
            taken = runs_of_rows(tensor, rows)
        assert torch.equal(taken, tensor[rows])
        assert set(counting.launched) <= {"cat"}


def test_the_share_of_many_outputs_is_that_of_their_random_sums(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(160, 12, generator=generator), torch.zeros(3000, 12)
    true = 0.3 * torch.randn(3000, 12, generator=generator)
    true[:40] *= 30  # a few outputs have most of the error
    errors = x @ true.T + 4 * torch.randn(160, 3000, generator=generator)
    shares = {}
    for mixed in (1024, 3000):
        monkeypatch.setattr(statistics, "_MIXED", mixed)
        place = site(x, errors, weight)
        shares[mixed] = measure_share(place.moments, place.held, 0.0, centred=False)
    assert 0.1 < shares[3000] < 0.99
    assert shares[1024] == pytest.approx(shares[3000], abs=0.02)
    assert shares[1024] != shares[3000]


def test_a_stream_that_is_a_sum_of_blocks_is_added_up_and_not_run(monkeypatch):
    def prune():
        model, inside = tiny_llama().double(), []
        run, compute = LayerPass.run, stream.compute_target

        def counted(layer, *args):
            with monkeypatch.context() as here:
                here.setattr(LayerPass, "run", lambda *a, **k: inside.append(0) or run(*a, **k))
                return compute(layer, *args)

        with monkeypatch.context() as here:
            here.setattr(stream, "compute_target", counted)
            result = prunekit.prune(model, ratio=0.3, calibration=token_ids(48))
        return model.state_dict(), result.plan, len(inside)

    added, plan, ran = prune()
    monkeypatch.setattr(targets, "_is_sum_of", lambda *_: torch.tensor(False))
    streamed, other, ran_then = prune()
    assert (ran, plan) == (0, other)
    assert ran_then > 0
    for name, tensor in added.items():
        torch.testing.assert_close(tensor, streamed[name])  # to 1e-7 in float64


def test_what_is_beside_the_blocks_is_no_sum_of_them():
    parts = [torch.randn(2, 3, 8).bfloat16() for _ in range(2)]
    total = parts[0] + parts[1]
    assert targets._is_sum_of(total, parts)
    total[1, 2, 3] *= 1.1
    assert not targets._is_sum_of(total, parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is missing")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-2, 1.0, 3e4])
def test_half_precision_is_multiplied_on_a_gpu_and_summed_in_float32(dtype, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 700, 1100, generator=generator).to("cuda", dtype)
    errors = (size * torch.randn(5, 700, 90, generator=generator)).cuda()
    moments = Moments(1100, "a", "cuda", dtype, 90)
    for part in range(5):
        moments.add(x[part : part + 1], errors[part : part + 1])
    moments.finish()
    wide, lost = x.flatten(0, 1).double(), errors.flatten(0, 1).double()
    hessian = wide.T @ wide / len(wide)
    cross = lost.T @ wide / len(wide)
    assert (moments.hessian - hessian).norm() < 1e-4 * hessian.norm()
    assert (moments.cross - cross).norm() < 5e-3 * cross.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is missing")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-9, 1.0])
def test_weighted_rows_are_multiplied_in_half_precision_on_a_gpu(dtype, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 700, 1100, generator=generator).to("cuda", dtype)
    errors = torch.randn(5, 700, 90, generator=generator).cuda()
    weights = (size * torch.rand(5, 700, generator=generator).square()).cuda()
    moments = Moments(1100, "a", "cuda", dtype, 90, weighted=True)
    for part in range(5):
        rows = slice(part, part + 1)
        moments.add(x[rows], errors[rows], weights=weights[rows])
    moments.finish()
    wide, lost = x.flatten(0, 1).double(), errors.flatten(0, 1).double()
    share = (weights.double() / weights.double().sum()).flatten()[:, None]
    hessian, cross = wide.T @ (share * wide), lost.T @ (share * wide)
    assert (moments.hessian - hessian).norm() < 5e-3 * hessian.norm()
    assert (moments.cross - cross).norm() < 5e-3 * cross.norm()
    torch.testing.assert_close(moments.mean.double(), (share * wide).sum(0), rtol=1e-2, atol=1e-3)
