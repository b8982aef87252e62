import weakref

import pytest
import torch
from conftest import example, randomise, tiny_llama, token_ids
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

import prunekit
from prunekit.calibration.gradients import mean_loss, passes, state
from prunekit.calibration.gradients import scores as scoring
from prunekit.calibration.gradients import tapped as tapped_modules
from prunekit.errors import ConfigError, DataError
from prunekit.graph import trace
from prunekit.importance import LoraGradient, TaylorFirst, TaylorMixed, TaylorSecond, TaylorVector
from prunekit.runtime.modes import undisturbed

TAYLOR = {
    "vector": TaylorVector,
    "first": TaylorFirst,
    "second": TaylorSecond,
    "mixed": TaylorMixed,
}
EVERY = [*TAYLOR.values(), LoraGradient]
ELEMENTS = {
    "vector": lambda w, g, f: g * w,
    "first": lambda w, g, f: (g * w).abs(),
    "second": lambda w, g, f: w**2 * f,
    "mixed": lambda w, g, f: (g * w - w**2 * f / 2).abs(),
}


def loss(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batches(ids, size=2):
    return [{"input_ids": chunk, "use_cache": False} for chunk in ids.split(size)]


def tiny_conv1d():
    config = GPT2Config(vocab_size=53, n_positions=32, n_embd=24, n_layer=2, n_head=4)
    return randomise(GPT2LMHeadModel(config))


def plain_moments(model, names, samples):
    """g and F by one backward pass a sample, as the formulas read; `samples`: lists of one row of
    ids each.
    """
    parameters = [model.get_parameter(name) for name in names]
    total = sum(ids.shape[1] - 1 for ids in samples)
    mean = [torch.zeros_like(p) for p in parameters]
    fisher = [torch.zeros_like(p) for p in parameters]
    for ids in samples:
        for k, g in enumerate(torch.autograd.grad(loss(model, ids), parameters)):
            mean[k] += g * (ids.shape[1] - 1) / total
            fisher[k] += g**2
    return {name: (g, f) for name, g, f in zip(names, mean, fisher, strict=True)}


def plain_scores(model, group, samples, kind, credit=lambda member: member.index):
    """Unit by unit, channel by channel."""
    parameters = dict(model.named_parameters())
    members = [m for m in group.members if m.parameter in parameters]
    moments = plain_moments(model, [m.parameter for m in members], samples)
    expected = torch.zeros(group.num_units, dtype=torch.float64)
    for member in members:
        weight = model.get_parameter(member.parameter).detach()
        elements = ELEMENTS[kind](weight, *moments[member.parameter]).movedim(member.dim, 0)
        for unit, positions in enumerate(credit(member)):
            for position in positions:
                expected[unit] += elements[position].sum().abs()
    return expected


@pytest.mark.parametrize("kind", TAYLOR)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_scores_of_a_plain_loop_over_the_samples(kind, kv_heads):
    model = tiny_llama(kv_heads, layers=2).double()
    graph = trace(model, example())
    groups = [g for g in graph.groups if g.prunable]
    ids = token_ids(5, 6)
    scores = TAYLOR[kind]().score(model, graph, groups, batches(ids))
    for group in groups:
        expected = plain_scores(model, group, ids.split(1), kind)
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", TAYLOR)
def test_heads_are_not_credited_as_repetition_by_kv_head(kind):
    """With 2 KV heads of 4 query heads each, query head h belongs to KV head h // 4, not h % 2."""
    model = tiny_llama(2, layers=1).double()
    graph = trace(model, example())
    group, ids = graph["layers.0.self_attn"], token_ids(3, 6)

    def transposed(member):
        units, width = member.index.shape
        repetitions = width // 6  # head_dim
        return (
            torch.arange(units * width)
            .view(repetitions, units, 6)
            .transpose(0, 1)
            .reshape(units, width)
        )

    scores = TAYLOR[kind]().score(model, graph, [group], batches(ids))[group.name]
    wrong = plain_scores(model, group, ids.split(1), kind, transposed)
    assert not torch.allclose(scores, wrong, rtol=1e-2)


@pytest.mark.parametrize("kind", TAYLOR)
def test_conv1d_weights_stand_the_other_way_round(kind):
    model = tiny_conv1d().double()
    graph = trace(model, example())
    ids = token_ids(4, 7, vocabulary=53)
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    scores = TAYLOR[kind]().score(model, graph, groups, batches(ids))
    for group in groups:
        expected = plain_scores(model, group, ids.split(1), kind)
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-6, atol=1e-12)


class Squares(nn.Module):
    """One hidden unit reads x, another is read: a loss whose gradients can be written down."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return {"loss": self.b(self.a(x)).mean()}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # A = [[1, -2], [3, 1]], b = [2, -1], x_1 = (1, 1), x_2 = (3, -1): L_j = b A x_j, mean x =
        # (2, 0) ∂L/∂A = bᵀ x̄ = [[4, 0], [-2, 0]];  F_A = Σ_j b² x_j² = [[40, 8], [10, 2]] A x_1 =
        # (-1, 4), A x_2 = (5, 8): ∂L/∂b = (2, 6), F_b = (26, 80)
        ("vector", [abs(4) + abs(2 * 2), abs(-6) + abs(-6)]),
        ("first", [4 + 0 + 4, 6 + 0 + 6]),
        ("second", [40 + 4 * 8 + 4 * 26, 9 * 10 + 2 + 80]),
        ("mixed", [abs(4 - 20) + 16 + abs(4 - 52), abs(-6 - 45) + 1 + abs(-6 - 40)]),
    ],
)
def test_two_by_two_by_hand(kind, expected):
    net = Squares()
    net.a.weight.data = torch.tensor([[1.0, -2.0], [3.0, 1.0]])
    net.b.weight.data = torch.tensor([[2.0, -1.0]])
    data = torch.tensor([[1.0, 1.0], [3.0, -1.0]])
    graph = trace(net, {"x": data})
    group = next(g for g in graph.groups if len(g.members) == 2)
    for size in (1, 2):
        scores = TAYLOR[kind]().score(net, graph, [group], [{"x": x} for x in data.split(size)])
        assert scores[group.name].tolist() == pytest.approx(expected)


def test_a_channel_cancels_in_vector_only():
    net = Squares()
    net.a.weight.data = torch.tensor([[1.0, -1.0], [3.0, 1.0]])
    net.b.weight.data = torch.tensor([[1.0, 1.0]])
    data = torch.tensor([[1.0, 1.0]])
    graph = trace(net, {"x": data})
    group = next(g for g in graph.groups if len(g.members) == 2)
    assert TaylorVector().score(net, graph, [group], [{"x": data}])[group.name].tolist() == [0, 8]
    assert TaylorFirst().score(net, graph, [group], [{"x": data}])[group.name].tolist() == [2, 8]


@pytest.mark.parametrize("importance", EVERY)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_ignored(importance, side):
    model = tiny_llama()
    graph = trace(model, example())
    groups = [graph["layers.0.mlp"], graph["layers.1.self_attn"]]
    ids = token_ids(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    if side == "left":
        ids, mask = ids.clone(), mask.flip(1)
    own = ids[:1][mask[:1] == 1][None]
    apart = [{"input_ids": own}, {"input_ids": ids[1:]}]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = [{"input_ids": ids, "attention_mask": mask, "position_ids": positions}]
    expected = importance().score(model, graph, groups, apart)
    for name, scores in importance().score(model, graph, groups, padded).items():
        torch.testing.assert_close(scores, expected[name], rtol=1e-4, atol=1e-7)


def all_scores(importance, model, graph, data, **options):
    return importance(**options).score(model, graph, [g for g in graph.groups if g.prunable], data)


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name, scores in left.items():
        torch.testing.assert_close(
            scores, right[name], **(tolerance or {"rtol": 1e-4, "atol": 1e-9})
        )


@pytest.mark.parametrize("importance", EVERY)
@pytest.mark.parametrize("make", [tiny_llama, tiny_conv1d])
def test_batches_checkpoints_and_memory_change_nothing(importance, make):
    model = make()
    graph = trace(model, example())
    ids = token_ids(6, 7, vocabulary=53)
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    whole = importance().score(model, graph, groups, batches(ids, 6))
    assert_same(whole, importance().score(model, graph, groups, batches(ids, 1)))
    assert_same(whole, importance(checkpointing=True).score(model, graph, groups, batches(ids, 4)))
    if importance is not LoraGradient:
        for memory in (1, 30_000):
            assert_same(
                whole, importance(memory=memory).score(model, graph, groups, batches(ids, 4))
            )


def scored(model, layers=None):
    """The parameters of the groups that are scored below, and their bytes in float32."""
    names = [n for n, _ in model.named_parameters() if ".layers." in n and "norm" not in n]
    own = [n for n in names if layers is None or f".layers.{layers}." in n]
    return sum(4 * model.get_parameter(name).numel() for name in own)


def watch_gradients(monkeypatch, model):
    """The most bytes of gradients and of their moments that live at the same time, in a list."""
    given, peak, add = [], [0], passes.GradientPass._add

    def watched(self, name, gradient, count):
        given.append(weakref.ref(gradient))
        add(self, name, gradient, count)
        live = [tensor for one in given if (tensor := one()) is not None]
        live += [p.grad for p in model.parameters() if p.grad is not None]
        live += [moment for moments in self.totals.values() for moment in moments.values()]
        peak[0] = max(peak[0], sum({t.data_ptr(): t.nbytes for t in live}.values()))

    monkeypatch.setattr(passes.GradientPass, "_add", watched)
    return peak


@pytest.mark.parametrize("importance", TAYLOR.values())
@pytest.mark.parametrize("size", [6, 2])
def test_gradients_of_at_most_one_layer_live_at_a_time(importance, size, monkeypatch):
    model = tiny_llama(layers=4)
    graph = trace(model, example())
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    data = batches(token_ids(6, 7), size)
    whole = importance(checkpointing=False, memory=10**9).score(model, graph, groups, data)
    peak, layer = watch_gradients(monkeypatch, model), scored(model, 0)
    options = {"memory": layer // 2} if size == 2 else {}
    assert_same(whole, importance(**options).score(model, graph, groups, data), rtol=0, atol=0)
    assert 0 < peak[0] <= layer < scored(model) / 3


@pytest.mark.parametrize("importance", EVERY)
@pytest.mark.parametrize("size", [6, 2])
def test_where_memory_is_short_layers_run_again_and_parameters_take_turns(
    importance, size, monkeypatch
):
    model = tiny_llama(layers=4)
    graph = trace(model, example())
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    data, runs = batches(token_ids(6, 7), size), {"model": 0, "layer": 0}
    model.register_forward_hook(lambda *_: runs.update(model=runs["model"] + 1))
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: runs.update(layer=runs["layer"] + 1)
    )

    def score(free):
        runs.update(model=0, layer=0)
        for module in (state, scoring):
            monkeypatch.setattr(module, "free_bytes", lambda device: free)
        found = importance().score(model, graph, groups, data)
        return found, runs["model"], runs["layer"]

    plenty, passes_of_plenty, layers = score(1e12)
    assert passes_of_plenty == layers
    short, passes_of_short, layers = score(scored(model))
    assert layers > passes_of_short, "layers run again in the backward pass"
    takes_turns = size == 2 and importance in (TaylorFirst, TaylorMixed)
    assert (passes_of_short > passes_of_plenty) == takes_turns
    assert_same(plenty, short, rtol=1e-12, atol=0)


def test_bytes_of_activations_are_counted():
    """Beside what a forward pass keeps of all rows, each storage once."""
    model, kept = tiny_llama(), {}
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = {"input_ids": token_ids(6, 20), "use_cache": False}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mean = mean_loss(model, batch)
    with undisturbed(model):
        counted = state.count_saved_bytes(model, batch, dict(model.named_parameters()))
        assert not any(p.requires_grad for p in model.parameters())
    assert mean.value.requires_grad
    assert sum(kept.values()) <= counted <= 2 * sum(kept.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_without_gradients_is_the_same(side):
    model, ids = tiny_llama(), token_ids(4, 9)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    for by_sample in (False, True):
        whole = mean_loss(model, batch, by_sample=by_sample)
        with torch.no_grad():
            rows = mean_loss(model, batch, by_sample=by_sample)
        assert rows.counts == whole.counts
        torch.testing.assert_close(rows.value, whole.value.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("importance", [TaylorSecond, TaylorMixed])
@pytest.mark.parametrize("make", [tiny_llama, tiny_conv1d])
def test_hooks_equal_one_backward_a_sample(importance, make, monkeypatch):
    model = make()
    graph = trace(model, example())
    ids = token_ids(4, 7, vocabulary=53)
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    tapped = importance(checkpointing=False).score(model, graph, groups, batches(ids))
    assert len(calls) == 1 + 2  # one sample to see what the modules do, two batches
    monkeypatch.setattr(tapped_modules, "is_stock", lambda module: False)
    assert_same(tapped, importance(checkpointing=False).score(model, graph, groups, batches(ids)))
    assert len(calls) == 3 + 1 + 4


class Oddities(nn.Module):
    """A language model with a layer that runs twice, one that is overridden, one seen flat, one
    whose weight is used outside of it too, and a tied weight.
    """

    def __init__(self):
        super().__init__()

        class Double(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        self.embed = nn.Embedding(53, 12)
        self.twice, self.scaled, self.flat = nn.Linear(12, 12), Double(12, 12), nn.Linear(12, 12)
        self.plain, self.out = nn.Linear(12, 20), nn.Linear(20, 12)
        self.shared = nn.Linear(12, 12)
        self.head = nn.Linear(12, 53, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        x = x + self.twice(self.twice(x).tanh())
        x = x + self.scaled(x).tanh()
        x = x + self.flat(x.flatten(0, 1)).view(x.shape).tanh()
        x = x + self.out(self.plain(x).relu_())
        x = x + self.shared(x).tanh() * torch.stack([*self.shared.weight.split(4)]).sum()
        return CausalLMOutput(logits=self.head(x))


@pytest.mark.parametrize("kind", TAYLOR)
def test_modules_that_hooks_cannot_read(kind):
    model = randomise(Oddities()).double()
    graph = trace(model, {"input_ids": token_ids(2, 7, vocabulary=53)})
    ids = token_ids(4, 7, vocabulary=53)
    groups = [g for g in graph.groups if g.members]
    scores = TAYLOR[kind]().score(model, graph, groups, batches(ids))
    for group in groups:
        expected = plain_scores(model, group, ids.split(1), kind)
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-8, atol=1e-14)


def test_which_modules_are_read_by_hooks():
    model = Oddities()
    names = [name for name, _ in model.named_parameters()]
    found = tapped_modules.find_tapped(model, batches(token_ids(4, 7, vocabulary=53)), names)
    assert set(found) == {
        *("plain.weight", "plain.bias", "out.weight", "out.bias"),
        "shared.bias",
    }


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("importance", EVERY)
@pytest.mark.parametrize("error", [None, Broken, KeyboardInterrupt])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_is_left_as_it_was(importance, error, checkpointing):
    model = tiny_llama(layers=2).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    graph = trace(model, example())
    groups = [graph["layers.0.mlp"], graph["layers.1.self_attn"]]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def state():
        flags = [
            (p.requires_grad, p.grad is None or p.grad.sum().item()) for p in model.parameters()
        ]
        hooks = [
            (len(m._forward_hooks), len(m._backward_hooks), sorted(vars(m)), m.training)
            for m in model.modules()
        ]
        tensor_hooks = [
            (p._backward_hooks, p._post_accumulate_grad_hooks) for p in model.parameters()
        ]
        return flags, hooks, [tuple(map(bool, h)) for h in tensor_hooks]

    def fail(module, args):
        if torch.is_grad_enabled() and error:
            raise error("in the middle of a pass")

    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(fail)
    was = state()

    def run():
        backend = importance(checkpointing=checkpointing)
        return backend.score(model, graph, groups, batches(token_ids()))

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert state() == was
    handle.remove()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert model.lm_head.weight.grad.eq(1).all()


@pytest.mark.parametrize("importance", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(importance, dtype):
    """Float32 scores within rounding, and no Fisher information lost to underflow."""
    model = tiny_llama(layers=1).to(dtype)
    with torch.no_grad():  # gradients of about 1e-5, whose squares half precision rounds to nothing
        model.lm_head.weight.mul_(1e-3)
    graph = trace(model, example())
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    ids = token_ids(4, 8)
    half = importance().score(model, graph, groups, batches(ids))
    full = importance().score(model.float(), graph, groups, batches(ids))
    for name, scores in full.items():
        assert (half[name] > 0).all()
        error = (half[name] - scores).norm() / scores.norm()
        assert error < 0.1


def test_a_member_without_a_gradient_scores_zero():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.a(x).relu()
            return {"loss": y.square().mean(), "y": self.b(y)}

    net = Net()
    graph = trace(net, {"x": torch.randn(3, 4)})
    group = next(
        g for g in graph.groups if any(m.parameter == "b.weight" and m.dim == 1 for m in g.members)
    )
    for importance in (TaylorFirst, TaylorMixed):
        scores = importance().score(net, graph, [group], [{"x": torch.randn(3, 4)}])[group.name]
        assert torch.isfinite(scores).all() and scores.sum() > 0
    with torch.no_grad():
        net.a.requires_grad_(False)
    net.forward = lambda x: {"loss": x.sum()}
    assert (
        TaylorFirst().score(net, graph, [group], [{"x": torch.randn(3, 4)}])[group.name].sum() == 0
    )


@pytest.mark.parametrize("importance", EVERY)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_that_is_not_finite_names_its_parameter(importance, checkpointing):
    model = tiny_llama(layers=1)
    graph = trace(model, example())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    for size in (2, 4):
        with pytest.raises(
            DataError, match=r"^model\.layers\.0\.mlp\.\S+: its gradient holds NaN or infinity$"
        ):
            importance(checkpointing=checkpointing).score(
                model, graph, [graph["layers.0.mlp"]], batches(token_ids(), size)
            )


@pytest.mark.parametrize("importance", EVERY)
def test_data_without_a_target(importance):
    model = tiny_llama(layers=1)
    graph = trace(model, example())
    groups = [graph["layers.0.mlp"]]
    one = [{"input_ids": token_ids(2, 1)}]
    padding = [
        {"input_ids": token_ids(2, 5), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}
    ]
    for data in (one, padding, padding * 2, []):
        with pytest.raises(DataError, match="not a single token to predict"):
            importance().score(model, graph, groups, data)


@pytest.mark.parametrize("importance", EVERY)
def test_a_model_without_a_loss(importance):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = trace(net, (torch.randn(2, 4),))
    with pytest.raises(DataError, match="scalar `loss`"):
        importance().score(net, graph, [graph.groups[0]], [{"input": torch.randn(2, 4)}])


def test_memory_must_be_positive():
    with pytest.raises(
        ConfigError, match="memory: expected a positive number of bytes or null, got 0"
    ):
        TaylorFirst(memory=0)


STEP = 1e-3  # norms compute in float32 however wide the model is


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_taylor_from_finite_differences_is_credited_to_the_right_unit(kv_heads):
    """Σ |g w| over what a KV head owns, g by central differences in float64; a (rep, kv) mix-up
    would fail here.
    """
    model = tiny_llama(
        kv_heads, attention="eager", layers=1
    ).double()  # its norms still compute in float32: hence the step of 1e-3
    graph = trace(model, example())
    ids = token_ids(3, 4)
    group = graph["layers.0.self_attn"]
    scores = TaylorFirst().score(model, graph, [group], batches(ids))[group.name]
    expected = torch.zeros(group.num_units, dtype=torch.float64)
    for member in group.members:
        weight = model.get_parameter(member.parameter).data

        def moved(step, place, name=member.parameter, weight=weight):
            """The loss with one number of the weight moved."""
            changed = (weight.flatten() + step * (torch.arange(weight.numel()) == place)).view_as(
                weight
            )
            logits = torch.func.functional_call(
                model, {name: changed}, kwargs={"input_ids": ids}
            ).logits
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        places = torch.arange(weight.numel()).view_as(weight).movedim(member.dim, 0)
        for unit, positions in enumerate(member.index):
            own = places[positions].flatten()
            up, down = (
                torch.func.vmap(moved, (None, 0), chunk_size=512)(step, own)
                for step in (STEP, -STEP)
            )
            expected[unit] += ((up - down) / (2 * STEP) * weight.flatten()[own]).abs().sum()
    torch.testing.assert_close(scores, expected, rtol=5e-3, atol=1e-6)


def test_taylor_of_a_module_with_its_own_loss():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.b(self.a(x).relu())
            return {"loss": y.square().mean(), "y": y}

    net = Net()
    result = prunekit.prune(
        net,
        ratio=0.3,
        method="llm_pruner",
        calibration=[{"x": torch.randn(8, 4)}],
        overrides=["policy=uniform"],
    )
    assert net.a.out_features == net.b.in_features < 6
    assert sum(map(len, result.plan.removed.values())) == 6 - net.a.out_features


def test_a_model_that_overwrites_what_its_gradients_need_is_told_so():
    made = torch.ones(3, requires_grad=True).exp()
    loss = made.mul_(2).sum()
    with pytest.raises(
        ConfigError, match=r"^importance: the model overwrites .* magnitude or obs$"
    ):
        passes._run_backwards(loss)
