"""Consumers are uses of parameters: the inputs of the product over the units, of no other use."""

import pytest
import torch
import torch.nn.functional as F
from conftest import inputs_of, randomise, tiny_llama, token_ids
from torch import nn

import prunekit
from prunekit.calibration.activations import gather_input_statistics
from prunekit.calibration.walk import Walk, find_consumers
from prunekit.errors import ConfigError, TraceError
from prunekit.surgery.shapes import find_needed_multiples


def group_of(graph, parameter, dim):
    """The group that a dim of a parameter belongs to."""
    (group,) = (
        g for g in graph.groups for m in g.members if (m.parameter, m.dim) == (parameter, dim)
    )
    return group


def hessian_seen(model, group, batches, parameter):
    """E[x xᵀ] and the number of tokens that a walk gathers for the consumer of a parameter."""
    ((_, sites),) = list(Walk(model=model, groups=[group], batches=batches))
    (site,) = (s for s in sites if any(c.member.parameter == parameter for c in s.consumers))
    return site.moments.hessian.double(), site.moments.tokens


def second_moment(x):
    x = x.double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("length", [16, 48])  # 48: as many tokens as hidden channels
def test_a_tied_weight_is_fed_what_the_head_is_fed(length):
    model, ids = tiny_llama(tied=True, layers=2), token_ids(8, length)
    graph = prunekit.trace(model, {"input_ids": ids[:2], "use_cache": False})
    group = group_of(graph, "model.embed_tokens.weight", 1)
    fed = inputs_of(model, "lm_head", ids)
    batches = [{"input_ids": ids, "use_cache": False}]
    hessian, tokens = hessian_seen(model, group, batches, "model.embed_tokens.weight")
    assert tokens == ids.numel()
    torch.testing.assert_close(hessian, second_moment(fed), rtol=1e-3, atol=1e-3)

    statistics = gather_input_statistics(model, ["model.embed_tokens.weight"], batches)
    norm = statistics["model.embed_tokens.weight"].norm()
    torch.testing.assert_close(norm, fed.norm(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [16, 48])
def test_channels_leave_a_tied_weight_as_it_is_but_for_their_columns(length):
    dense = tiny_llama(tied=True, layers=2).model.embed_tokens.weight.detach().clone()
    model = tiny_llama(tied=True, layers=2)
    result = prunekit.prune(
        model, ratio=0.15, calibration=token_ids(32, length), overrides=["groups=channel"]
    )
    ((_, units),) = result.plan.removed.items()
    kept = [j for j in range(48) if j not in units]
    assert torch.equal(model.model.embed_tokens.weight, dense[:, kept])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # The other consumers are repaired.
    untouched = tiny_llama(tied=True, layers=2).model.layers[0].mlp.up_proj.weight[:, kept]
    assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight, untouched, atol=1e-3)


class Autoencoder(nn.Module):
    """One square weight that encodes, and decodes transposed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, 6))

    def forward(self, x):
        return F.linear(F.linear(x, self.weight).relu(), self.weight.t())


class Matrices(nn.Module):
    """Two square matrices in one module, the second fed by the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.empty(6, 6)) for _ in range(2))

    def forward(self, x):
        return (x @ self.first).relu() @ self.second


@pytest.mark.parametrize(
    ("build", "parameter", "hidden", "repairable"),
    [
        (Autoencoder, "weight", lambda m, x: F.linear(x, m.weight).relu(), False),
        (Matrices, "second", lambda m, x: (x @ m.first).relu(), True),
    ],
)
def test_the_inputs_of_the_product_count_and_not_those_of_the_module(
    build, parameter, hidden, repairable
):
    model, x = randomise(build(), 1), torch.randn(20, 6)
    graph = prunekit.trace(model, {"x": x[:2]})
    group = group_of(graph, parameter, 0)
    (consumer,) = find_consumers(model, group)
    assert consumer.is_repairable == repairable
    hessian, tokens = hessian_seen(model, group, [{"x": x}], parameter)
    assert tokens == len(x)
    torch.testing.assert_close(hessian, second_moment(hidden(model, x).detach()))


class Before(nn.Linear):
    """A linear module of one's own that does something before its one product."""

    def __init__(self, how):
        super().__init__(8, 4)
        self.how = how

    def forward(self, x):
        return self.how(self, x)


class Called(nn.Module):
    """Calls it on what a linear module makes."""

    def __init__(self, how):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), Before(how)

    def forward(self, x):
        return self.down(self.up(x).tanh())


@pytest.mark.parametrize(
    ("how", "is_linear"),
    [
        (lambda m, x: F.linear(x.relu(), m.weight, m.bias), False),
        (lambda m, x: F.linear(input=x.relu(), weight=m.weight), False),
        (lambda m, x: torch.addmm(m.bias, x.relu(), m.weight.t()), False),
        (lambda m, x: F.linear(x.relu().double(), m.weight.double()).float(), False),
        (lambda m, x: torch.einsum("...i,oi->...o", x.relu(), m.weight), False),
        (lambda m, x: torch.einsum("oi,it->to", m.weight, x.relu().t()), False),
        (lambda m, x: (m.weight @ x.relu().t()).t(), False),
        (lambda m, x: F.linear(x.relu() if x.ndim == 2 else x, m.weight, m.bias), True),
        (lambda m, x: x.relu() @ m.weight.t() if x.ndim == 2 else F.linear(x, m.weight), False),
    ],
    ids=[
        *("activation", "keywords", "addmm", "cast", "einsum", "einsum of columns", "columns"),
        *("linear elsewhere", "linear elsewhere without the bias"),
    ],
)
def test_what_a_module_multiplies_counts_and_not_what_it_is_called_with(how, is_linear):
    """The columns that stay solve the least squares of the product on its own inputs."""
    model, x = randomise(Called(how), 1), torch.randn(64, 5)
    hidden, weight = model.up(x).tanh().detach().double(), model.down.weight.detach().double()
    hidden = hidden.relu()
    (consumer,) = find_consumers(model, prunekit.trace(model, {"x": x[:2]})["mlp"])
    assert consumer.is_linear == is_linear
    result = prunekit.prune(model, ratio=0.3, calibration=[{"x": x}])
    kept = [j for j in range(8) if j not in result.plan.removed["mlp"]]
    best = torch.linalg.lstsq(hidden[:, kept], hidden @ weight.T).solution.T
    torch.testing.assert_close(model.down.weight.double(), best, rtol=1e-2, atol=1e-2)


def tensordot(module, x):
    """A product that nothing shows."""
    return torch.einsum("ti,oi->ot", x.relu(), module.weight * 2).t()


def slices(module, x):
    """Two halves of a matrix, each with inputs of its own."""
    return torch.cat([F.linear(x, module.weight[:2]), F.linear(x.sin(), module.weight[2:])], -1)


@pytest.mark.parametrize(
    "how",
    [tensordot, lambda m, x: F.linear(x, m.weight) + tensordot(m, x), slices],
    ids=["all", "a part", "slices"],
)
def test_a_product_that_nothing_shows_leaves_its_group_whole_before_calibration(how):
    model = randomise(Called(how), 1)
    with pytest.raises(ConfigError, match=r"down\.weight is multiplied by in another way"):
        prunekit.prune(model, ratio=0.3, calibration=[{"x": torch.randn(64, 5)}])
    prunekit.prune(model, ratio=0.3, method="magnitude", calibration=[{"x": torch.randn(8, 5)}])
    assert model.down.weight.shape[1] < 8


def test_a_norm_for_each_column_is_no_matrix_to_repair():
    normed = nn.utils.weight_norm(
        nn.Linear(8, 4), dim=1
    )  # of hooks: a linear module holds the parts
    model, batches = (
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), normed),
        [{"input": torch.randn(64, 5)}],
    )
    with pytest.raises(
        ConfigError, match="expects a weight that is a parameter, 2.weight_g is one"
    ):
        prunekit.prune(randomise(model, 1), ratio=0.2, calibration=batches)
    prunekit.prune(model, ratio=0.2, method="magnitude", calibration=batches)
    assert normed.weight_g.shape == (1, 6)


class Cast(nn.Module):
    """Stacked experts that take a token each, and are cast as a whole."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 6, 9)), nn.Parameter(torch.randn(2, 9, 6))

    def forward(self, x):
        down = self.down.double()
        hidden = [(x[:, e] @ self.up[e]).relu().double() for e in range(2)]
        return torch.stack([hidden[e] @ down[e] for e in range(2)], 1).to(x.dtype)


def test_each_expert_of_a_stack_that_is_cast_is_fed_its_own_inputs():
    model, x = randomise(Cast(), 1), torch.randn(40, 2, 6)
    group = group_of(prunekit.trace(model, {"x": x[:2]}), "down", 1)
    ((_, sites),) = Walk(model=model, groups=[group], batches=[{"x": x}])
    for site in sites:
        e = site.consumers[0].expert
        wanted = second_moment((x[:, e] @ model.up[e]).relu().detach())
        torch.testing.assert_close(site.moments.hessian.double(), wanted)


@pytest.mark.parametrize(
    "how",
    [lambda m, x: F.linear(x, m.weight), lambda m, x: F.linear(x, m.weight) + 3 * m.bias],
    ids=["none", "another"],
)
def test_biases_that_a_module_does_not_add_are_not_compensated_with(how):
    model, x = randomise(Called(how), 1), torch.randn(64, 5)
    with pytest.raises(ConfigError, match=r"expected modules that add a bias, down adds none"):
        prunekit.prune(model, ratio=0.3, calibration=[{"x": x}], overrides=["compensation=bias"])
    bias = model.down.bias.detach().clone()
    prunekit.prune(model, ratio=0.3, calibration=[{"x": x}], overrides=["compensation.bias=true"])
    assert torch.equal(model.down.bias, bias)


class Two(nn.Module):
    """Two consumers of the same units, fed in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.up, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.how = how

    def forward(self, x):
        return self.how(self, self.up(x).tanh())


def written_to(model, h):
    y = model.a(h)
    return y + model.b(F.silu(h, inplace=True))


@pytest.mark.parametrize(
    ("how", "fed", "sites"),
    [
        (lambda m, h: m.a(h) + m.b(input=h), lambda h: [h], 1),
        (written_to, lambda h: [F.silu(h)], 2),
        (lambda m, h: m.a(h) + m.b(h) + m.b(h.sin()), lambda h: [h, h.sin()], 2),
        (lambda m, h: m.a(h) + m.a(h.sin()) + m.b(h), lambda h: [h], 2),
        (lambda m, h: m.a(h.sin()) + m.a(h) + m.b(h), lambda h: [h], 2),
    ],
    ids=["the same", "written to", "one more", "one fewer", "another before"],
)
def test_consumers_share_moments_where_all_that_they_are_fed_is_the_same(how, fed, sites):
    model, x = randomise(Two(how), 1), torch.randn(64, 5)
    group = prunekit.trace(model, {"x": x[:2]})["mlp"]
    ((_, found),) = Walk(model=model, groups=[group], batches=[{"x": x[:40]}, {"x": x[40:]}])
    assert len(found) == sites
    (site,) = (s for s in found if any(c.name == "b" for c in s.consumers))
    inputs = torch.cat(fed(model.up(x).tanh().detach()))
    assert site.moments.tokens == len(inputs)
    torch.testing.assert_close(site.moments.hessian.double(), second_moment(inputs))


@pytest.mark.parametrize(
    "how",
    [
        lambda m, h: m.a(h) + m.b(h if len(h) == 40 else h.sin()),
        lambda m, h: m.a(h) + m.b(h) if len(h) == 40 else m.b(h) + m.a(h),
    ],
    ids=["inputs", "order"],
)
def test_consumers_that_part_in_a_later_batch_are_refused(how):
    model = randomise(Two(how), 1)
    batches = [{"x": torch.randn(40, 5)}, {"x": torch.randn(24, 5)}]
    group = prunekit.trace(model, {"x": torch.randn(40, 5)})["mlp"]
    with pytest.raises(TraceError, match="b: .* to be fed the inputs of a, as at first"):
        list(Walk(model=model, groups=[group], batches=batches))


class Soft(nn.Module):
    """Experts that are summed up by one product of three tensors."""

    def __init__(self):
        super().__init__()
        self.router, self.head = nn.Linear(6, 4), nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 9)), nn.Parameter(torch.randn(4, 9, 6))

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        hidden = torch.einsum("tc,ech->teh", x, self.up).relu()
        return self.head(x + torch.einsum("te,teh,ehc->tc", gates, hidden, self.down))


def test_stacked_weights_whose_inputs_nothing_shows_stay_whole_too():
    with pytest.raises(ConfigError, match="down is multiplied by in another way"):
        prunekit.prune(randomise(Soft(), 1), ratio=0.2, calibration=[{"x": torch.randn(64, 6)}])


class Residual(nn.Module):
    """A square matrix from the residual stream to itself."""

    def __init__(self):
        super().__init__()
        self.inner, self.square, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        stream = self.inner(x)
        return self.head(stream + self.square(stream))


def test_a_square_weight_of_the_residual_stream_has_a_role_in_each_dim():
    model = randomise(Residual(), 1)
    graph = prunekit.trace(model, {"x": torch.randn(2, 3)})
    group = group_of(graph, "head.weight", 1)
    roles = {(m.parameter, m.dim): m.role for m in group.members}
    assert roles["square.weight", 0] == "producer"
    assert roles["square.weight", 1] == "consumer"
    consumers = find_consumers(model, group)
    assert [(c.name, c.member.dim, c.is_repairable) for c in consumers] == [
        ("square", 1, True),
        ("head", 1, True),
    ]


class Outside(nn.Module):
    """A square layer that is called, and whose weight is used outside of the call, too."""

    def __init__(self, transposed):
        super().__init__()
        self.inner, self.square, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.transposed = transposed

    def forward(self, x):
        hidden = self.square(self.inner(x)).relu()
        if self.transposed:
            return self.head(F.linear(hidden, self.square.weight.t()))
        return self.head(hidden) + F.linear(self.inner(x).tanh(), self.square.weight).sum()


@pytest.mark.parametrize(("transposed", "dim"), [(True, 0), (False, 1)])
def test_a_use_outside_of_the_modules_call_is_no_use_whose_inputs_are_known(transposed, dim):
    model = Outside(transposed)
    graph = prunekit.trace(model, {"x": torch.randn(2, 3)})
    with pytest.raises(TraceError, match=r"square\.weight is used outside of it"):
        find_consumers(model, group_of(graph, "square.weight", dim))
    if transposed:  # the call itself is one, whose weight must stay as it is
        other = find_consumers(model, group_of(graph, "square.weight", 1))
        assert [(c.name, c.is_repairable) for c in other] == [("square", False), ("head", True)]


class HeadsOfThreeDims(nn.Module):
    """Attention whose projections are stored [d, heads, width]."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(8, 6, 4)) for _ in range(3))
        self.o = nn.Linear(24, 8)

    def forward(self, x):
        q, k, v = (torch.einsum("btd,dhe->bhte", x, w) for w in (self.q, self.k, self.v))
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_heads_of_three_dims_are_no_stacked_experts():
    graph = prunekit.trace(HeadsOfThreeDims(), {"x": torch.randn(2, 5, 8)})
    group = group_of(graph, "q", 1)
    assert find_needed_multiples(HeadsOfThreeDims(), [group]) == {group.name: 1}
