"""Gates on the masked model, by finite differences, against brute force; the budget, resuming."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from conftest import example, tiny_llama, token_ids
from families import build, values_of

import prunekit
from prunekit.errors import ConfigError, DataError
from prunekit.gates import (
    Bounds,
    HardConcreteRule,
    Layout,
    StraightThroughRule,
    Training,
    find_places,
    fold,
    gated,
    training,
)
from prunekit.gates.loss import divergence
from prunekit.gates.training import learn
from prunekit.graph import trace
from prunekit.importance import HardConcrete, StraightThrough
from prunekit.surgery.masking import masked

IDS = token_ids(2, 7)


def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def half_of(group):
    """Every other unit, at least one."""
    return list(range(0, group.num_units, 2))[: max(group.num_units // 2, 1)]


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", ("attention", "mlp", "query_head")),
        ("llama", ("head_dim",)),
        ("llama", ("layer",)),
        ("llama", ("channel",)),
        ("mixtral", ("expert", "mlp")),
        ("gpt2", ("attention", "mlp")),
    ],
)
def test_gates_of_zero_make_the_masked_model(family, kinds):
    model = tiny_llama(kv_heads=2) if family == "llama" else build(family, values_of(family))
    graph = trace(model, {"input_ids": IDS, "use_cache": False})
    groups = [g for g in (*graph.groups, *graph.stacks) if g.kind in kinds and g.num_units > 1]
    assert {group.kind for group in groups} == set(kinds)
    removed = {group.name: half_of(group) for group in groups}
    values = {group.name: torch.ones(group.num_units) for group in groups}
    for name, units in removed.items():
        values[name][units] = 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        with gated(find_places(model, graph, groups), values):
            own = logits(model)
        with masked(model, graph, removed):
            expected = logits(model)
        dense = logits(model)
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert (own - dense).abs().max() > 1e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kinds", [("attention", "mlp"), ("layer",)])
def test_gradients_of_gates_are_those_of_finite_differences(kinds):
    model = build("gpt2", values_of("gpt2")).double()  # its norms compute in float64, too
    graph = trace(model, example())
    groups = [g for g in (*graph.groups, *graph.stacks) if g.kind in kinds]
    layout, gates = Layout(groups, torch.device("cpu")), find_places(model, graph, groups)
    generator = torch.Generator().manual_seed(3)
    total = sum(layout.sizes)
    point = 0.3 + torch.rand(total, generator=generator, dtype=torch.float64)
    dense = logits(model).detach()

    def loss(flat):
        with gated(gates, layout.split(flat)):
            return divergence(logits(model), dense, {"input_ids": IDS})

    flat = point.clone().requires_grad_()
    with gated(gates, layout.split(flat)):
        divergence(logits(model), dense, {"input_ids": IDS}).backward()
    for unit in range(0, total, max(total // 5, 1)):
        step = torch.zeros_like(point)
        step[unit] = 1e-5
        with torch.no_grad():
            expected = (loss(point + step) - loss(point - step)) / 2e-5
        assert float(flat.grad[unit]) == pytest.approx(float(expected), rel=1e-5, abs=1e-9)


def test_what_stays_is_what_the_budget_would_keep_of_these_scores():
    graph = trace(tiny_llama(), example())
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    layout = Layout(groups, torch.device("cpu"))
    scores = torch.randint(0, 5, (sum(layout.sizes),)).float()  # many are equal
    removed = {group.name: group.num_units // 3 for group in groups}
    kept = layout.split(layout.keep_highest(scores, layout.join(removed)))
    for name, own in layout.split(scores).items():
        order = sorted(range(len(own)), key=lambda unit, own=own: (own[unit], unit))
        gone = order[: removed[name]]
        assert [unit for unit in range(len(own)) if not kept[name][unit]] == sorted(gone)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_step_keeps_exactly_to_the_budget(scope, monkeypatch):
    model, seen = tiny_llama(kv_heads=2), []
    graph = trace(model, example())
    cost = graph.num_parameters
    sample = StraightThroughRule.sample

    def note(rule, uniform, heat):
        values = sample(rule, uniform, heat)
        counts = {n: int((own == 0).sum()) for n, own in rule.layout.split(values.detach()).items()}
        assert set(values.detach().unique().tolist()) <= {0.0, 1.0}
        seen.append(counts)
        return values

    monkeypatch.setattr(StraightThroughRule, "sample", note)
    importance = StraightThrough(train=Training(steps=6, reach=0.5, ramp="linear"))
    result = prune(model, importance, scope, ratio=0.3)
    cheapest = min(g.parameters_per_unit for g in graph.groups if g.kind == "mlp")
    for step, counts in enumerate(seen):
        removed = {name: list(range(count)) for name, count in counts.items()}
        share = min((step + 1) / 3, 1.0)
        off = graph.removed_parameters(removed) - 0.3 * share * cost()
        assert abs(off) <= cheapest / 2 + 1e-6
    assert len(seen) == 6
    assert result.report["ratio"]["achieved"] == pytest.approx(0.3, abs=cheapest / cost())


def prune(model, importance, scope="local", ratio=0.2, **kwargs):
    overrides = [f"scope={scope}", "shapes=free", "data.calibration.batch_size=2"]
    overrides += kwargs.pop("overrides", [])
    return prunekit.prune(
        model,
        ratio=ratio,
        method="llm_pruner",
        policy="uniform",
        importance=importance,
        calibration=token_ids(8, 9),
        overrides=overrides,
        **kwargs,
    )


def toy(seed):
    """One layer, whose four heads and eight channels differ in what they are worth."""
    model = tiny_llama(layers=1, heads=4, ffn=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    layer = model.model.layers[0]
    with torch.no_grad():
        worth = torch.rand(4, generator=generator).repeat_interleave(6) * 2
        layer.self_attn.o_proj.weight.mul_(worth)
        layer.mlp.down_proj.weight.mul_(torch.rand(8, generator=generator) * 4)
    return model


def losses_of_all_masks(model, ids):
    """(heads, channels) that go → KL, by a forward pass in which every mask has rows of its own."""
    masks = list(itertools.product(*(itertools.combinations(range(n), n // 2) for n in (4, 8))))
    kept = [torch.ones(len(masks), n) for n in (4, 8)]
    for row, gone in enumerate(masks):
        for own, units in zip(kept, gone, strict=True):
            own[row, list(units)] = 0
    layer, handles = model.model.layers[0], []
    for module, own in zip((layer.self_attn.o_proj, layer.mlp.down_proj), kept, strict=True):
        width = module.weight.shape[1] // own.shape[1]
        factors = own.repeat_interleave(width, 1).repeat_interleave(len(ids), 0)[:, None]
        handles.append(module.register_forward_pre_hook(lambda _, x, f=factors: (x[0] * f,)))
    with torch.no_grad():
        every = logits(model, ids.repeat(len(masks), 1)).log_softmax(-1)
        for handle in handles:
            handle.remove()
        dense = logits(model, ids).log_softmax(-1).repeat(len(masks), 1, 1)
    own = (dense.exp() * (dense - every)).sum(-1).view(len(masks), -1).mean(1)
    return dict(zip(masks, own.tolist(), strict=True))


@functools.cache
def graph_of_toy():
    return trace(toy(0), example())


@pytest.mark.parametrize("seed", range(5))
def test_training_finds_the_best_mask_of_all_420(seed):
    """Without exchanges straight-through gates of seed 1 take the second best, 0.4 % worse."""
    model, ids = toy(seed), token_ids(8, 9, seed=seed)
    groups = [g for g in graph_of_toy().groups if g.kind in ("attention", "mlp")]
    losses = losses_of_all_masks(model, ids)
    best = min(losses, key=losses.get)
    train = Training(steps=24, batch_size=8, holdout=0, seed=seed, exchanges=24)
    slow = replace(train, steps=40, reach=0.2, evaluations=8, learning_rate=0.3, exchanges=30)
    options = {"multiplier": "balanced", "pressure": 8.0, "scale": False}
    for importance in (StraightThrough(train=train), HardConcrete(train=slow, **options)):
        batch = {"input_ids": ids, "use_cache": False}
        scores = importance.score(model, graph_of_toy(), groups, [batch])
        lowest = [scores[group.name].argsort()[: group.num_units // 2] for group in groups]
        assert tuple(tuple(sorted(units.tolist())) for units in lowest) == best


def test_learned_factors_go_into_the_weights_exactly():
    model = tiny_llama(kv_heads=2).double()
    graph = trace(model, example())
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    generator = torch.Generator().manual_seed(1)
    values = {
        g.name: torch.rand(g.num_units, generator=generator, dtype=torch.float64) for g in groups
    }
    with torch.no_grad():
        with gated(find_places(model, graph, groups), values):
            expected = logits(model)
        for group in groups:
            fold(model, graph, group, values[group.name])
        torch.testing.assert_close(logits(model), expected, rtol=1e-12, atol=1e-12)


def test_a_run_with_factors_equals_the_gated_model():
    """What is cut is what the gates, as they were judged last, leave of the dense model."""
    settled = {}

    class Noting(StraightThroughRule):
        def learned(self):
            settled.update(self.layout.split(self.settled()))
            return super().learned()

    class Importance(StraightThrough):
        def make_rule(self, layout, bounds, first):
            return Noting(layout, bounds, first, noise=0.1, scale=True)

    train = Training(steps=8, learning_rate=0.1)
    result = prune(tiny_llama(kv_heads=2), Importance(train=train, scale=True), "global", 0.3)
    dense = tiny_llama(kv_heads=2)
    groups = [result.graph[name] for name in settled]
    with torch.no_grad(), gated(find_places(dense, result.graph, groups), settled):
        expected = logits(dense)
    with torch.no_grad():
        torch.testing.assert_close(logits(result.model), expected, rtol=1e-4, atol=1e-5)
    assert any(((own != 0) & (own != 1)).any() for own in settled.values())


def test_the_temperature_goes_from_one_number_to_the_other(monkeypatch):
    """At each step it is what the ramp says; two equal numbers give the gates of one."""
    seen, sample = [], HardConcreteRule.sample

    def note(rule, uniform, heat):
        seen.append(rule.temperature)
        return sample(rule, uniform, heat)

    monkeypatch.setattr(HardConcreteRule, "sample", note)
    groups = [g for g in graph_of_toy().groups if g.kind in ("attention", "mlp")]
    batch = {"input_ids": token_ids(4, 9), "use_cache": False}

    def learn_at(temperature, ramp="linear"):
        seen.clear()
        own = {"temperature": temperature, "temperature_ramp": ramp}
        train = Training(steps=5, reach=0, learning_rate=2, holdout=0, **own)
        scores = HardConcrete(train=train, pressure=50).score(
            toy(0), graph_of_toy(), groups, [batch]
        )
        return torch.cat([scores[group.name] for group in groups])

    falling = learn_at([1.0, 0.5])
    assert seen == [1.0, 0.875, 0.75, 0.625, 0.5]
    learn_at((1.0, 0.5), "cubic")
    assert seen == [1.0, 0.7109375, 0.5625, 0.5078125, 0.5]
    constant = learn_at(2 / 3)
    assert seen == [2 / 3] * 5
    assert torch.equal(learn_at([2 / 3, 2 / 3]), constant)
    assert torch.equal(learn_at(None), constant)
    assert not torch.equal(falling, constant)


class Killed(Exception):
    pass


def test_a_run_that_was_broken_off_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    train = Training(steps=12, optimizer="NAdam", learning_rate=0.5, evaluations=4, rank=2)
    train = replace(train, temperature=[1.0, 0.5], temperature_ramp="cubic")
    importance, calls = HardConcrete(train=train, pressure=50, sublayers=True), [0]
    whole = prune(tiny_llama(layers=1, ffn=16), importance, "global")
    update = training._Trainer._update

    def count(self, step):
        calls[0] += 1
        if calls[0] == 8:
            raise Killed
        update(self, step)

    monkeypatch.setattr(training._Trainer, "_update", count)
    state = tmp_path / "state"
    with pytest.raises(Killed):
        prune(tiny_llama(layers=1, ffn=16), importance, "global", state=state)
    calls[0], start = 100, tiny_llama(layers=1, ffn=16)
    again = prune(start, importance, "global", state=state, overrides=["resume=true"])
    assert calls[0] == 100 + 7, "the steps from the last state on"
    assert again.plan == whole.plan
    expected = whole.model.state_dict()
    assert all(torch.equal(own, expected[n]) for n, own in again.model.state_dict().items())


def test_layers_that_are_computed_again_give_the_same_gates():
    model = tiny_llama(layers=2).requires_grad_(False)  # a frozen model learns gates, too
    graph = trace(model, example())
    groups = [g for g in (*graph.groups, *graph.stacks) if g.kind in ("attention", "mlp", "layer")]
    batches = [{"input_ids": ids, "use_cache": False} for ids in token_ids(8, 9).split(4)]
    plain, again = (
        StraightThrough(train=Training(steps=2, checkpointing=on, rank=2)).score(
            model, graph, groups, batches
        )
        for on in (False, True)
    )
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_training_stops_where_nothing_gets_better(monkeypatch):
    steps, update = [], training._Trainer._update

    def note(self, step):
        steps.append(step)
        update(self, step)

    monkeypatch.setattr(training._Trainer, "_update", note)
    # Steps so short that no choice changes.
    train = Training(steps=40, reach=0, evaluations=40, patience=3, learning_rate=1e-9)
    prune(tiny_llama(), StraightThrough(train=train))
    assert 4 <= len(steps) <= 6


def test_bad_input_is_one_line():
    for options, expected in [
        ({"steps": 0}, "importance.train.steps: expected a whole number"),
        ({"ramp": "square"}, "importance.train.ramp: .*linear"),
        ({"reach": 1.0}, "importance.train.reach: expected a share"),
        ({"kl": 0.0}, "plain or kl > 0"),
        ({"learning_rate": 0}, "learning_rate > 0"),
        ({"temperature": 0}, "importance.train.temperature: expected a number > 0, or two of"),
        ({"temperature": [1.0, 0.5, 0.1]}, r"two of them, got \[1.0, 0.5, 0.1\]"),
        ({"temperature_ramp": "cosine"}, "importance.train.temperature_ramp: .*linear"),
        ({"optimizer": "adam"}, r"importance\.train\.optimizer: unknown 'adam'.*Adam"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            Training(**options)
    model = tiny_llama()
    graph = trace(model, example())
    groups = [replace(graph["layers.0.self_attn"], num_units=1)]
    batch = {"input_ids": IDS, "use_cache": False}
    with pytest.raises(ConfigError, match="expected two units or more"):
        StraightThrough().score(model, graph, groups, [batch])
    padded = {**batch, "attention_mask": torch.eye(*IDS.shape)}
    for nothing in ([], [padded]):
        with pytest.raises(DataError, match="expected texts of two tokens or more"):
            learn(model, graph, groups, nothing, None, None, Training())


def test_updates_of_weights_are_merged_as_they_were_trained():
    """The cut model is the gated one with its adapters, by a forward pass of the trainer."""
    left = {}

    class Noting(training._Trainer):
        def run(self, saved):
            learned = super().run(saved)
            settled = self.rule.settled()
            with torch.no_grad(), self._open(settled):
                left["logits"] = logits(self.model)
                with gated(self.gates, self.rule.layout.split(settled)):
                    left["without"] = logits(self.model)
            left["gone"] = int((settled == 0).sum())
            return learned

    train = Training(steps=4, rank=3, update_rate=0.05)
    importance = StraightThrough(train=train, scale=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_Trainer", Noting)
        result = prune(tiny_llama(kv_heads=2), importance, "global", 0.3)
    with torch.no_grad():
        torch.testing.assert_close(logits(result.model), left["logits"], rtol=1e-4, atol=1e-5)
    assert left["gone"] == sum(map(len, result.plan.removed.values()))
    assert (left["without"] - left["logits"]).abs().max() > 1e-2
    with pytest.raises(ConfigError, match="expected compensation=none where weights are trained"):
        prune(tiny_llama(kv_heads=2), importance, compensation="obs")


@pytest.mark.parametrize("kind", [StraightThroughRule, HardConcreteRule])
def test_the_gate_of_a_sublayer_is_a_factor_on_all_of_its_units(kind):
    """Whole sublayers go where their gates fall, and the choice ranks both gates of a unit."""
    graph = trace(tiny_llama(), example())
    groups = [*(g for g in graph.groups if g.kind in ("attention", "mlp")), *graph.stacks]
    layout = Layout(groups, torch.device("cpu"), [group.name for group in groups])
    ones = dict.fromkeys(layout.names, 1.0)
    pinned = {name: {} for name in layout.names}
    gone = {group.name: group.num_units // 2 for group in groups}
    bounds = Bounds(solve=lambda *_: gone, competing=True, prices=ones, pinned=pinned)
    options = {"noise": 0.0} if kind is StraightThroughRule else {"pressure": 1.0}
    options |= {"scale": kind is HardConcreteRule, "sublayers": True}
    rule = kind(layout, bounds, torch.arange(sum(layout.sizes)).float(), **options)
    rule.temperature = 0.5
    rule.aim(1.0)
    uniform = torch.full([rule.draws], 0.5)
    before = rule.learned().scores
    with torch.no_grad():
        rule.parameters["wholes"].copy_(torch.linspace(-20, 20, len(groups)))
    after = rule.learned().scores
    first, *middle, stack = layout.names
    assert after[first].max() < min(after[name].min() for name in middle)
    torch.testing.assert_close(after[stack], before[stack], rtol=1e-3, atol=1e-3)
    for name in layout.names:  # the order inside of a group is that of its units
        assert torch.equal(after[name].argsort(stable=True), before[name].argsort(stable=True))
    weights = torch.rand(sum(layout.sizes), generator=torch.Generator().manual_seed(0))
    (rule.sample(uniform, 1.0) * weights).sum().backward()
    assert (rule.parameters["wholes"].grad[1:-1] != 0).any()
    assert float(rule.parameters["wholes"].grad[-1]) == 0
    if kind is HardConcreteRule:
        values = layout.split(rule.sample(uniform, 1.0).detach())
        assert not values[first].any() and values[stack].any()


def test_a_sublayer_that_does_nothing_goes_as_a_whole():
    model = tiny_llama(layers=2, ffn=16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    train = Training(steps=10, reach=0.3, evaluations=1, learning_rate=0.5)
    importance = HardConcrete(train=train, sublayers=True)
    result = prune(model, importance, "global", 0.4, overrides=["scope.min_units=0"])
    assert result.plan.removed["layers.1.mlp"] == list(range(16))
