"""Token weights against weighted least squares, hooks of the whole model, and autograd: float64."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama, token_ids
from families import FIRST, build
from torch import nn

import prunekit
from prunekit.calibration import walk as walking
from prunekit.calibration.concentration import measure_concentration
from prunekit.calibration.moments import Moments
from prunekit.calibration.statistics import invert_moments, pose_problem
from prunekit.calibration.walk import Walk
from prunekit.calibration.weighting import Weighting
from prunekit.compensation import Obs as Repair
from prunekit.errors import ConfigError, DataError
from prunekit.graph import trace
from prunekit.importance import Obs
from prunekit.obs.inverse import remove_columns
from prunekit.schedules import State


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def padded(rows=6, length=9):
    """A batch with padding on the left of one row and on the right of another."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, :3] = 0
    mask[2, 5:] = 0
    return {"input_ids": token_ids(rows, length), "attention_mask": mask, "use_cache": False}


def split(batch, size):
    keys = [key for key in batch if key != "use_cache"]
    parts = zip(*(batch[key].split(size) for key in keys), strict=True)
    return [{**dict(zip(keys, part, strict=True)), "use_cache": False} for part in parts]


def blocks(model):
    graph = trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    return [group for group in graph.groups if group.kind in ("attention", "mlp")]


def test_moments_and_repair_are_weighted_least_squares():
    x, w, weight = draw(4, 25, 12), draw(4, 25, seed=1).square(), draw(5, 12, seed=2)
    error = draw(4, 25, 5, seed=3)
    moments = Moments(12, "here", dtype=x.dtype, outputs=5, weighted=True)
    for i in range(0, 4, 2):
        part = slice(i, i + 2)
        moments.add(x[part], error[part], weights=w[part])
    moments.finish()
    rows, errors, share = x.flatten(0, 1), error.flatten(0, 1), (w / w.sum()).flatten()[:, None]
    torch.testing.assert_close(moments.hessian, rows.T @ (share * rows))
    torch.testing.assert_close(moments.mean, (share * rows).sum(0))
    torch.testing.assert_close(moments.cross, errors.T @ (share * rows))
    torch.testing.assert_close(moments.error, (share * errors).sum(0))
    removed, kept = torch.tensor([0, 4, 7]), [1, 2, 3, 5, 6, 8, 9, 10, 11]
    repaired = remove_columns(weight, invert_moments(moments, 0.0).matrix, removed)
    root = share.sqrt()
    best = torch.linalg.lstsq(root * rows[:, kept], root * (rows @ weight.T)).solution.T
    torch.testing.assert_close(repaired[:, kept], best)


def test_parts_of_weighted_moments_together_are_those_of_all():
    x, w = draw(30, 8), draw(30, seed=1).square()
    parts = [Moments(8, "here", dtype=x.dtype, weighted=True) for _ in range(3)]
    for part, rows in zip(parts, (slice(0, 7), slice(7, 30), slice(0, 0)), strict=True):
        part.add(x[rows], weights=w[rows])
        part.finish()
    whole = Moments(8, "here", dtype=x.dtype, weighted=True)
    whole.add(x, weights=w)
    together, whole = Moments.together(parts), whole.finish()
    torch.testing.assert_close(together.hessian, whole.hessian)
    torch.testing.assert_close(together.mean, whole.mean)
    torch.testing.assert_close(together.weight, whole.weight)


def watch(model, batch):
    """By group, of the whole model: the consumer's inputs, and ‖h‖² of the stream behind it."""
    found, handles = {}, []

    def see(name, x, stream):
        found[name] = (x.detach(), stream.detach().square().sum(-1))

    def layer_hook(i, layer, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        stream = hidden + layer.self_attn.o_proj(inputs[i, "attn"])
        see(f"layers.{i}.self_attn", inputs[i, "attn"], stream)
        stream = output if isinstance(output, torch.Tensor) else output[0]
        see(f"layers.{i}.mlp", inputs[i, "mlp"], stream)

    inputs = {}
    for i, layer in enumerate(model.model.layers):
        for kind, module in (("attn", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):

            def note(_, args, key=(i, kind)):
                inputs[key] = args[0]

            handles.append(module.register_forward_pre_hook(note))

        def whole(*arguments, i=i):
            layer_hook(i, *arguments)

        handles.append(layer.register_forward_hook(whole, with_kwargs=True))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def gradients(model, batch):
    """By group, ∂L/∂y [B, T, d] of the consumer's output y, by autograd on the summed loss."""
    outputs, handles = {}, []
    for i, layer in enumerate(model.model.layers):
        for kind, module in (("self_attn", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):

            def keep(_, args, output, name=f"layers.{i}.{kind}"):
                output.retain_grad()
                outputs[name] = output

            handles.append(module.register_forward_hook(keep))
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    logits = model(**batch).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    (losses * (mask[:, 1:] & mask[:, :-1]).flatten()).sum().backward()
    for handle in handles:
        handle.remove()
    return {name: output.grad for name, output in outputs.items()}


def expected_weights(weighting, model, batch, watched):
    """By group, the weights [B, T], computed from all tokens at once."""
    mask = batch["attention_mask"].bool()
    if weighting.tokens == "gradient":
        found = gradients(copy.deepcopy(model), batch)
        return {name: delta.square().sum(-1) for name, delta in found.items()}
    if weighting.tokens == "without_first":
        rows = torch.zeros(mask.shape, dtype=torch.float64)
        for row, own in zip(rows, mask, strict=True):
            row[own.nonzero().flatten()[weighting.first_tokens :]] = 1
        return dict.fromkeys(watched, rows)
    if weighting.tokens == "relative":
        return {name: 1 / norm for name, (_, norm) in watched.items()}
    weights = {}
    for name, (_, norm) in watched.items():
        inside = norm[mask]
        limits = [v for v in inside if (inside <= v).double().mean() >= weighting.clip_quantile]
        weights[name] = (min(limits) / norm).clamp(max=1)
    return weights


WEIGHTINGS = [
    Weighting(tokens="relative"),
    Weighting(tokens="clipped", clip_quantile=0.7),
    Weighting(tokens="without_first", first_tokens=2),
    Weighting(tokens="gradient"),
]


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda weighting: weighting.tokens)
@pytest.mark.parametrize("target", ["pruned", "residual"])
def test_every_site_has_the_weighted_moments_of_the_dense_model(weighting, target):
    """Nothing is cut on the way, so that the whole model gives the same inputs."""
    model, batch = tiny_llama().double(), padded(12)
    groups, watched = blocks(model), watch(model, batch)
    expected = expected_weights(weighting, model, batch, watched)
    mask = batch["attention_mask"].bool()
    targets = {} if target == "pruned" else {group.name: target for group in groups}
    walk = Walk(
        model=model,
        groups=groups,
        batches=split(batch, 5),
        targets=targets,
        weighting=weighting if target == "pruned" else Weighting(),
        choosing=weighting,
    )
    for group, (site,) in walk:
        x, weights = watched[group.name][0][mask], expected[group.name][mask][:, None]
        own = site.moments if target == "pruned" else site.choosing
        torch.testing.assert_close(own.hessian, x.T @ (weights * x) / weights.sum())
        assert (site.choosing is None) == (target == "pruned")  # alike, they are gathered once
        if target == "residual":
            site.merge_held_out()
            torch.testing.assert_close(site.moments.hessian, x.T @ x / len(x))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("outputs", ["diagonal", "full"])
def test_a_choice_by_fisher_information_is_that_of_the_weighted_outputs(outputs):
    """By hand: G = Σ δ δᵀ by autograd, and the loop over channels that tries each of them."""
    model, batch = tiny_llama(layers=1, ffn=12).double(), padded(12)
    (group,) = (group for group in blocks(model) if group.kind == "mlp")
    delta = gradients(copy.deepcopy(model), batch)[group.name].flatten(0, 1)
    metric = delta.T @ delta
    if outputs == "diagonal":
        metric = metric.diagonal().diag()
    x = watch(model, batch)[group.name][0][batch["attention_mask"].bool()]
    weight = model.model.layers[0].mlp.down_proj.weight.detach()
    hessian, removed, alive = x.T @ x, [], list(range(12))
    for _ in range(5):
        errors = []
        for unit in alive:
            kept = [i for i in alive if i != unit]
            solved = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.T).T
            lost = weight.clone()
            lost[:, kept] -= solved
            errors.append(((metric @ lost) * (lost @ hessian)).sum())
        removed.append(alive.pop(int(torch.stack(errors).argmin())))
    model.requires_grad_(False)  # the outputs of a frozen model have gradients all the same
    walk = Walk(model=model, groups=[group], batches=split(batch, 5), outputs=outputs)
    ((_, (site,)),) = walk
    problem = pose_problem(site, site.weight(), invert_moments(site.moments, 0.0))
    assert Obs().choose([problem], 5) == removed
    site.metric = None
    problem = pose_problem(site, site.weight(), invert_moments(site.moments, 0.0))
    assert Obs().choose([problem], 5) != removed


@pytest.mark.parametrize("compete", ["relative", "loss"])
def test_units_compete_by_what_they_add_to_the_error_of_their_group(compete):
    """By hand: the least squares without the first units of the order, by autograd's G or none."""
    model, batch = tiny_llama(layers=1, ffn=12).double(), padded(12)
    outputs = "full" if compete == "loss" else "equal"
    importance = Obs(compete=compete, outputs=outputs, damping=0.0)
    groups, mask = blocks(model), batch["attention_mask"].bool()
    graph = trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    scores = importance.score(model, graph, groups, split(batch, 5))
    deltas = gradients(copy.deepcopy(model), batch)
    for group in groups:
        (member,) = group.consumers
        x, delta = watch(model, batch)[group.name][0][mask], deltas[group.name].flatten(0, 1)
        weight = model.get_parameter(member.parameter).detach()
        metric = delta.T @ delta if compete == "loss" else torch.eye(len(weight)).double()
        unit = 1 / len(x) if compete == "loss" else 1 / (x @ weight.T).square().sum()
        order = scores[group.name].argsort().tolist()
        for k in range(1, len(order)):
            kept = member.index[order[k:]].flatten().tolist()
            solved = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution
            lost = x @ weight.T - x[:, kept] @ solved
            error = ((lost @ metric) * lost).sum() * unit
            torch.testing.assert_close(
                scores[group.name][order[:k]].sum(), error, rtol=1e-3, atol=1e-9
            )


def test_the_share_of_the_trace_that_the_largest_tokens_own():
    model, batch = tiny_llama(layers=2).double(), padded(40, 30)
    mask, found = batch["attention_mask"].bool(), watch(model, batch)
    groups = blocks(model)
    shares = measure_concentration(model, groups, split(batch, 7))
    assert list(shares) == [group.name for group in groups]
    count = int(mask.sum())
    place = (mask.cumsum(1) - 1)[mask]
    for name, own in shares.items():
        squares = found[name][0][mask].square().sum(-1)
        largest = squares.argsort(descending=True)[: round(count / 100)]
        assert own.percent == pytest.approx(float(squares[largest].sum() / squares.sum()))
        assert own.permille == pytest.approx(float(squares.max() / squares.sum()))
        assert own.positions == {int(place[squares.argmax()]): 1}


def test_the_choice_and_the_repair_go_by_weights_of_their_own():
    """On one layer, whose inputs no cut changes: the choice of one run, the repair of another."""
    ids = token_ids(24, 12)

    def make_model():
        model = tiny_llama(layers=1).double()
        model.model.embed_tokens.weight.data[:20] *= 20  # these tokens have large norms
        return model

    dense = make_model()
    x, norm = watch(dense, {"input_ids": ids})["layers.0.mlp"]
    x, norm = x.flatten(0, 1), norm.flatten()

    def prune(importance, compensation):
        model = make_model()
        weights = (Obs(tokens=importance), Repair(tokens=compensation, target="pruned"))
        options = ["groups=mlp", "shapes=free", "schedule.damping=0"]
        backends = {"importance": weights[0], "compensation": weights[1]}
        result = prunekit.prune(model, ratio=0.12, calibration=ids, overrides=options, **backends)
        return result.plan.removed["layers.0.mlp"], model.model.layers[0].mlp.down_proj.weight

    plans, weight = {}, dense.model.layers[0].mlp.down_proj.weight
    for importance in ("equal", "relative"):
        for compensation in ("equal", "relative"):
            removed, repaired = prune(importance, compensation)
            plans[importance, compensation] = removed
            kept = [i for i in range(40) if i not in removed]
            root = (1 / norm if compensation == "relative" else torch.ones_like(norm)).sqrt()
            wanted = root[:, None] * (x @ weight.T)
            best = torch.linalg.lstsq(root[:, None] * x[:, kept], wanted).solution.T
            torch.testing.assert_close(repaired, best, rtol=1e-6, atol=1e-8)
    assert plans["equal", "equal"] == plans["equal", "relative"]
    assert plans["relative", "equal"] == plans["relative", "relative"]
    assert plans["equal", "equal"] != plans["relative", "equal"]


def test_a_massive_token_owns_the_moments_no_longer():
    """One position has activations a thousand times the others'; the choice is made for these."""
    x, weight = draw(400, 12), draw(5, 12, seed=1)
    x[:, 3] *= 0.01  # what the massive token alone needs
    x[0] = 0
    x[0, 3] = 1e3
    for weights, first in ((None, False), (1 / x.square().sum(1), True)):
        moments = Moments(12, "here", dtype=x.dtype, weighted=weights is not None)
        moments.add(x, weights=weights)
        moments.finish()
        inverse = invert_moments(moments, 0.0).matrix
        errors = weight.square().sum(0) / inverse.diagonal()
        assert (errors.argmin() == 3) == first


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "gpt2"])
def test_models_without_a_plain_stream_say_what_is_weighed(family, monkeypatch):
    said = []
    monkeypatch.setattr("prunekit.calibration.weigher.say", said.append)
    model = build(family, FIRST[family], "sdpa", "eager")
    options = ["importance.tokens=relative", "compensation.tokens=relative"]
    prunekit.prune(model, calibration=token_ids(16, 12), overrides=options)
    expected = {"gemma2": "norm of its own output", "qwen3_moe": "no single output", "gpt2": None}
    assert (expected[family] is None) == (not said)
    assert not said or expected[family] in " ".join(said)
    assert len(said) <= 2  # each is said once


def test_without_layers_the_own_output_is_weighed(monkeypatch):
    """A plain network, in passes of the whole model; against its own outputs."""
    said = []
    monkeypatch.setattr("prunekit.calibration.weigher.say", said.append)
    monkeypatch.setattr(walking.Stream, "open", classmethod(lambda *_: None))
    model, batch = tiny_llama().double(), padded(4)
    groups = blocks(model)[:2]
    watched, mask = watch(model, batch), batch["attention_mask"].bool()
    walk = Walk(model=model, groups=groups, batches=[batch], weighting=Weighting(tokens="relative"))
    for group, (site,) in walk:
        x = watched[group.name][0][mask]
        output = F.linear(x, site.consumers[0].weight(), site.consumers[0].bias)
        weights = 1 / output.square().sum(-1, keepdim=True)
        torch.testing.assert_close(site.moments.hessian, x.T @ (weights * x) / weights.sum())
    assert len(said) == 1 and "norm of its own output" in said[0]


def test_a_model_without_norms_is_weighed_by_its_own_outputs(monkeypatch):
    said = []
    monkeypatch.setattr("prunekit.calibration.weigher.say", said.append)
    model = tiny_llama()
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
    model.model.norm = nn.Identity()
    options = ["compensation.tokens=relative"]
    prunekit.prune(model, calibration=token_ids(16, 12), overrides=options)
    assert len(said) == 1 and "no residual stream with norms" in said[0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("importance.tokens=relativ", r"importance.tokens: unknown 'relativ': did you mean rel"),
        ("compensation.tokens=all", r"compensation.tokens: unknown 'all'"),
        ("compensation.clip_quantile=1.0", r"compensation.clip_quantile: .*\(0, 1\), got 1.0"),
        ("importance.clip_quantile=0", r"importance.clip_quantile: .*\(0, 1\), got 0"),
        ("importance.first_tokens=0", r"importance.first_tokens: .* ≥ 1, got 0"),
        ("compensation.first_tokens=1.5", r"compensation.first_tokens: .* ≥ 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(ConfigError, match=message):
        prunekit.prune(tiny_llama(), calibration=token_ids(), overrides=[option])


def test_samples_and_models_that_leave_no_weights_are_refused():
    options = ["compensation.tokens=without_first", "compensation.first_tokens=9"]
    with pytest.raises(DataError, match="samples of more than 9 tokens, the longest has 9"):
        prunekit.prune(tiny_llama(), calibration=token_ids(4, 9), overrides=options)
    model = tiny_llama()
    groups, batches = blocks(model), [{"input_ids": token_ids()}]
    model.lm_head.register_forward_pre_hook(lambda _, args: args[0].detach())
    weighting = Weighting(tokens="gradient")
    with pytest.raises(DataError, match="a model through which gradients flow, none reaches"):
        next(iter(Walk(model=model, groups=groups, batches=batches, weighting=weighting)))


def test_the_quantile_is_over_the_tokens_of_all_processes(monkeypatch):
    squares = [draw(3, 7).square(), draw(2, 7, seed=1).square()]
    weighting = Weighting(tokens="clipped", clip_quantile=0.8)
    whole = weighting.of_norms(squares)
    monkeypatch.setattr("prunekit.calibration.weighting.world_size", lambda: 2)
    monkeypatch.setattr(
        "prunekit.calibration.weighting.gather_all", lambda own: [own, squares[1].flatten()]
    )
    assert torch.equal(weighting.of_norms(squares[:1])[0], whole[0])


BOTH = ["importance.tokens=relative", "compensation.tokens=gradient"]


def test_a_weighted_run_goes_on_to_the_same_end(monkeypatch, tmp_path):
    ids = token_ids(24, 10)
    whole = prunekit.prune(tiny_llama(), calibration=ids, overrides=BOTH)
    record, count = State.record, []

    def interrupted(self, group, finished, consumers):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(group)
        record(self, group, finished, consumers)

    monkeypatch.setattr(State, "record", interrupted)
    state, model = tmp_path / "state", tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        prunekit.prune(model, calibration=ids, overrides=BOTH, state=state)
    monkeypatch.undo()
    again = prunekit.prune(model, calibration=ids, overrides=[*BOTH, "resume=true"], state=state)
    assert again.plan == whole.plan
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_processes_add_up_their_weighted_moments(monkeypatch):
    """Threads stand for processes, which take about a minute to start on a busy machine."""
    x, w = draw(30, 8), draw(30, seed=1).square()
    barrier, shown = threading.Barrier(2), {}

    def add_up(tensor):
        shown[threading.get_ident()] = tensor.clone()
        barrier.wait()
        tensor.copy_(sum(shown.values()))
        barrier.wait()
        return tensor

    whole = Moments(8, "here", dtype=x.dtype, weighted=True)
    whole.add(x, weights=w)
    whole.finish()
    monkeypatch.setattr("prunekit.calibration.moments.world_size", lambda: 2)
    monkeypatch.setattr("prunekit.calibration.moments.add_up", add_up)
    parts = [Moments(8, "here", dtype=x.dtype, weighted=True) for _ in range(2)]
    parts[0].add(x[:11], weights=w[:11])
    parts[1].add(x[11:], weights=w[11:])
    with ThreadPoolExecutor(2) as threads:
        for part in threads.map(Moments.finish, parts):
            torch.testing.assert_close(part.hessian, whole.hessian)
            torch.testing.assert_close(part.mean, whole.mean)
            torch.testing.assert_close(part.weight, whole.weight)
