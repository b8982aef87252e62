"""Networks of every other kind: what is prunable, and that cutting it leaves what zeroing it
leaves.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from conftest import randomise, zero_units
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import prunekit
from prunekit.errors import SurgeryError

IMAGES = (2, 3, 8, 8)
ROWS = (2, 7, 5)


class Net(nn.Module):
    """Layers by name, run by a function of the module and its input."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(*sizes, **kwargs):
    return nn.Conv2d(*sizes, **{"kernel_size": 3, "padding": 1} | kwargs)


def densenet(net, x):
    a = net.first(x)
    b = net.second(a.relu())
    c = net.third(torch.cat([a, b], 1).relu())
    return net.head(F.adaptive_avg_pool2d(net.norm(torch.cat([a, b, c], 1)), 1).flatten(1))


def unet(net, x):
    a = net.down(x).relu()
    b = net.deep(F.max_pool2d(a, 2)).relu()
    wider = F.interpolate(F.avg_pool2d(net.up(b), 2), scale_factor=2, mode="nearest")
    return net.out(net.join(torch.cat([wider, F.pad(a, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]], 1)).relu())


def residual(net, x):
    x = net.stem(x)
    x = x + net.outer(net.norm(net.inner(x)).relu())
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    return net.head((shortcut + net.wide(x)).mean((2, 3)))


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions and a fused qkv, under names of its own."""

    def __init__(self, width=24, heads=4, head_width=6):
        super().__init__()
        self.h, self.d, self.scale = heads, head_width, 0.3
        inner = heads * head_width
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 5, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * inner), nn.Linear(inner, width)
        self.mlp = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        rows, places, _ = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .reshape(rows, places, 3, self.h, self.d)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        mixed = (
            F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            .transpose(1, 2)
            .reshape(rows, places, -1)
        )
        x = x + self.proj(mixed)
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


class Einsum(nn.Module):
    """Attention and a bottleneck in nothing but einsum and bare parameters."""

    def __init__(self):
        super().__init__()
        shapes = {
            "q": (5, 4, 6),
            "k": (5, 4, 6),
            "v": (5, 4, 3),
            "o": (4, 3, 5),
            "w": (5, 7),
            "u": (7, 2),
        }
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x):
        q, k = (torch.einsum("btd,dhk->bhtk", x, w) for w in (self.q, self.k))
        v = torch.einsum("...td,dhk->...thk", x, self.v)
        weights = torch.einsum("bhqk,bhtk->bhqt", q, k).softmax(-1)
        x = x + torch.einsum("bhqt,bthk,hkd->bqd", weights, v, self.o)
        return torch.einsum("btd,df,fe->bte", x, self.w, self.u)


class Shared(nn.Module):
    """One block run three times under two names, embeddings tied to the output, a layer nobody
    calls.
    """

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.again, self.idle, self.out = self.down, nn.Linear(8, 9), nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for _ in range(2):
            x = x + self.down(self.up(x).relu())
        return self.out(x + self.again(self.up(x).tanh()))


class Buffers(nn.Module):
    """Buffers as wide as the channels, one of them not saved."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.rand(8) + 0.5)
        self.register_buffer("mask", torch.rand(1, 1, 8), persistent=False)

    def forward(self, x):
        return self.second((self.first(x) * self.scale).relu() * self.mask)


def mlp(*sizes, activation=nn.ReLU):
    layers = [
        layer
        for i, o in zip(sizes, sizes[1:], strict=False)
        for layer in (nn.Linear(i, o), activation())
    ]
    return nn.Sequential(*layers[:-1])


NETS = {  # name → a network, its input, (kind, units) of what is prunable
    "mlp": (lambda: mlp(5, 8, 6, 3), ROWS, [("mlp", 8), ("mlp", 6)]),
    "resnet": (
        lambda: Net(
            residual,
            stem=conv(3, 8),
            inner=conv(8, 6),
            norm=nn.BatchNorm2d(6),
            outer=conv(6, 8),
            wide=conv(8, 12, stride=2),
            head=nn.Linear(12, 4),
        ),
        IMAGES,
        [("channel", 6), ("channel", 8)],
    ),
    "depthwise": (
        lambda: nn.Sequential(
            conv(3, 8), conv(8, 8, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), conv(8, 4)
        ),
        IMAGES,
        [("channel", 8)],
    ),
    "depth multiplier": (
        lambda: nn.Sequential(conv(3, 6), conv(6, 12, groups=6), nn.ReLU(), conv(12, 4)),
        IMAGES,
        [("channel", 6), ("channel", 2)],
    ),
    "grouped convolution": (
        lambda: nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 8, groups=4), nn.ReLU(), conv(8, 4)),
        IMAGES,
        [("channel", 3), ("channel", 4), ("channel", 2)],
    ),
    "depthwise after a concatenation": (
        lambda: Net(
            lambda n, x: n.out(n.depth(torch.cat([n.a(x), n.b(x)], 1))),
            a=conv(3, 5),
            b=conv(3, 4),
            depth=conv(9, 9, groups=9),
            out=conv(9, 2),
        ),
        IMAGES,
        [("channel", 5), ("channel", 4)],
    ),
    "densenet": (
        lambda: Net(
            densenet,
            first=conv(3, 6),
            second=conv(6, 5),
            third=conv(11, 4),
            norm=nn.BatchNorm2d(15),
            head=nn.Linear(15, 3),
        ),
        IMAGES,
        [("channel", 6), ("channel", 5), ("channel", 4)],
    ),
    "u-net": (
        lambda: Net(
            unet,
            down=conv(3, 6),
            deep=conv(6, 8),
            up=nn.ConvTranspose2d(8, 5, 2, stride=2),
            join=conv(11, 7),
            out=conv(7, 2),
        ),
        IMAGES,
        [("channel", 8), ("channel", 6), ("channel", 5), ("channel", 7)],
    ),
    "transposed in groups": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3),
            nn.ReLU(),
            nn.ConvTranspose1d(8, 6, 3, groups=2),
            nn.PReLU(6),
            nn.Conv1d(6, 4, 1),
        ),
        (2, 3, 9),
        [("channel", 4), ("channel", 2), ("channel", 3)],
    ),
    "norms of groups": (
        lambda: nn.Sequential(
            conv(3, 12),
            nn.GroupNorm(4, 12),
            nn.ReLU(),
            conv(12, 4),
            nn.InstanceNorm2d(4),
            conv(4, 2),
        ),
        IMAGES,
        [("channel", 4), ("channel", 3), ("channel", 4)],
    ),
    "flattened": (
        lambda: nn.Sequential(
            conv(3, 6),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(96, 10),
            nn.ReLU(),
            nn.Linear(10, 2),
        ),
        IMAGES,
        [("channel", 6), ("mlp", 10)],
    ),
    "gated": (
        lambda: nn.Sequential(nn.Linear(5, 16), nn.GLU(), nn.Linear(8, 3)),
        ROWS,
        [("mlp", 8)],
    ),
    "pixel shuffle": (
        lambda: nn.Sequential(conv(3, 20), nn.PixelShuffle(2), nn.ReLU(), conv(5, 2)),
        IMAGES,
        [("channel", 5)],
    ),
    "vision transformer": (
        VisionTransformer,
        IMAGES,
        [("attention", 4), ("head_dim", 6), ("mlp", 40), ("channel", 24)],
    ),
    "einsum": (
        Einsum,
        ROWS,
        [("head_dim", 6), ("attention", 4), ("channel", 3), ("other", 7)],
    ),
    "shared": (Shared, None, [("mlp", 12), ("channel", 8)]),
    "checkpointed": (
        lambda: Net(
            lambda n, x: n.out(
                torch.utils.checkpoint.checkpoint(n.block, n.stem(x), use_reentrant=False)
            ),
            stem=nn.Linear(5, 8),
            block=mlp(8, 12, 8),
            out=nn.Linear(8, 3),
        ),
        ROWS,
        [("mlp", 12), ("other", 8), ("other", 8)],
    ),
    "buffers": (Buffers, ROWS, [("channel", 8)]),
    "weight norm": (
        lambda: nn.Sequential(
            weight_norm(nn.Conv2d(3, 8, 3)),
            nn.ReLU(),
            weight_norm(nn.ConvTranspose2d(8, 10, 3)),  # a norm for each channel that comes in
            nn.Flatten(2),
            nn.ReLU(),
            nn.Linear(64, 2),
        ),
        IMAGES,
        [("channel", 8)],
    ),
    "bags": (
        lambda: nn.Sequential(nn.EmbeddingBag(11, 8), nn.ReLU(), nn.Linear(8, 3)),
        None,
        [("mlp", 8)],
    ),
    "recurrent": (
        lambda: Net(
            lambda n, x: n.out(n.cell(n.stem(x))[0]),
            stem=nn.Linear(5, 6),
            cell=nn.LSTM(6, 8, num_layers=2),
            out=mlp(8, 10, 3),
        ),
        ROWS,
        [("mlp", 10)],
    ),
    "torch's attention": (
        lambda: nn.Sequential(
            nn.Linear(5, 16),
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, activation="gelu"),
                2,
                enable_nested_tensor=False,
            ),
            nn.Linear(16, 3),
        ),
        ROWS,
        [("mlp", 24), ("mlp", 24)],
    ),
}


def build(name):
    make, shape, expected = NETS[name]
    torch.manual_seed(0)
    net = randomise(make(), 0.4)
    x = torch.randint(0, 11, (2, 7)) if shape is None else torch.randn(shape)
    return net, prunekit.trace(net, (x,)), x, expected


@pytest.mark.parametrize("name", NETS)
def test_pruned_equals_masked(name):
    net, graph, x, expected = build(name)
    prunable = [group for group in graph.groups if group.prunable]
    assert sorted((group.kind, group.num_units) for group in prunable) == sorted(expected)
    plans = [
        {group.name: [0] if group.num_units < 4 else [0, group.num_units - 1]} for group in prunable
    ]
    together = [plan for plan in plans if all(graph[name].exact for name in plan)]
    every = {group: units for plan in together for group, units in plan.items()}
    for removed in [*plans, every] if every else plans:
        masked = zero_units(copy.deepcopy(net), graph, removed)
        pruned = copy.deepcopy(net)
        prunekit.apply_plan(pruned, graph, prunekit.PruningPlan(removed))
        gone = sum(p.numel() for p in net.parameters()) - sum(
            p.numel() for p in pruned.parameters()
        )
        assert gone == graph.removed_parameters(removed) > 0
        if all(graph[group].exact for group in removed):
            other = (
                torch.randint(0, 11, (3, 4))
                if not x.is_floating_point()
                else torch.randn(3, *x.shape[1:])
            )
            with torch.no_grad():
                assert (masked(other) - net(other)).abs().max() > 1e-3
                torch.testing.assert_close(pruned(other), masked(other), rtol=1e-4, atol=1e-4)


def test_a_cut_through_a_norm_equals_a_smaller_network():
    net, graph, x, _ = build("vision transformer")
    assert "normalises over it" in graph["channel"].reason
    prunekit.apply_plan(net, graph, prunekit.PruningPlan({"channel": [22, 23]}))
    dense, _, _, _ = build("vision transformer")
    reference = VisionTransformer(width=22)
    state = dense.state_dict()
    narrow = {n: state[n][tuple(map(slice, t.shape))] for n, t in reference.state_dict().items()}
    reference.load_state_dict(narrow)
    torch.testing.assert_close(net(x), reference(x), rtol=1e-4, atol=1e-4)

    net, graph, x, _ = build("norms of groups")
    (inner,) = (group for group in graph.groups if group.prunable and not group.exact)
    kept = [0, 2, 3, 5, 6, 8, 9, 11]  # the second channel of each of the four groups of three goes
    norm = nn.GroupNorm(4, 8)
    norm.load_state_dict({name: tensor[kept] for name, tensor in net[1].state_dict().items()})
    hidden = F.conv2d(x, net[0].weight[kept], net[0].bias[kept], padding=1)
    hidden = F.conv2d(norm(hidden).relu(), net[3].weight[:, kept], net[3].bias, padding=1)
    expected = net[5](net[4](hidden))
    prunekit.apply_plan(net, graph, prunekit.PruningPlan({inner.name: [1]}))
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


def reasons(name):
    _, graph, _, _ = build(name)
    return {
        m.parameter: group.reason
        for group in graph.groups
        if not group.prunable
        for m in group.members
    }


def test_why_not():
    assert "recurrent" in reasons("recurrent")["cell.weight_hh_l1"]
    assert (
        "MultiheadAttention" in reasons("torch's attention")["1.layers.0.self_attn.in_proj_weight"]
    )
    assert "does not use it" in reasons("shared")["idle.weight"]
    assert "vocabulary" in reasons("shared")["embed.weight"]
    assert "output" in reasons("mlp")["4.bias"]
    assert "input" in reasons("mlp")["0.weight"]
    assert "padded" in reasons("resnet")["wide.weight"]


class Divided(nn.Linear):
    """A linear module of one's own whose weight is divided by its norm."""

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


@pytest.mark.parametrize(
    ("make", "way_out"),
    [
        (spectral_norm, "remove_parametrizations"),
        (partial(weight_norm, dim=None), "remove_parametrizations"),
        (nn.utils.spectral_norm, "remove_spectral_norm"),
        (lambda linear: Divided(5, 8), "would change"),
    ],
    ids=["spectral norm", "one norm", "hooks", "own"],
)
def test_a_cut_that_would_change_the_weights_that_stay_is_refused(make, way_out):
    net = randomise(nn.Sequential(make(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3)))
    group = prunekit.trace(net, (torch.randn(2, 5),))["mlp"]
    assert not group.prunable
    assert way_out in group.reason


def test_a_weight_that_was_made_plain_is_cut():
    net = randomise(nn.Sequential(spectral_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 3)))
    nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    assert prunekit.trace(net, (torch.randn(2, 5),))["mlp"].exact


def test_a_weight_that_an_unknown_operator_makes_keeps_its_sizes():
    net = nn.Sequential(orthogonal(nn.Linear(6, 6)), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    graph = prunekit.trace(net, (torch.randn(2, 6),))
    assert graph["mlp"].prunable


def test_maxouts_are_ffns():
    def run(net, x):
        hidden = net.stem(x).unflatten(-1, (-1, 3)).amax(-1)
        return net.out(torch.maximum(net.first(hidden), net.second(hidden)))

    sizes = {"stem": (5, 24), "first": (8, 6), "second": (8, 6), "out": (6, 3)}
    net = randomise(Net(run, **{name: nn.Linear(*size) for name, size in sizes.items()}))
    batches = [{"x": torch.randn(4, 7, 5)}]
    result = prunekit.prune(net, ratio=0.3, method="magnitude", calibration=batches)
    kinds = {group.num_units: group.kind for group in result.graph.groups if group.exact}
    assert kinds == {8: "mlp", 6: "mlp"}
    assert net.first.in_features < 8
    assert net.out.in_features < 6


def test_attributes_follow():
    net, graph, _, _ = build("grouped convolution")
    groups = {group.num_units: group.name for group in graph.groups if group.prunable}
    prunekit.apply_plan(
        net, graph, prunekit.PruningPlan({groups[4]: [1], groups[3]: [0], groups[2]: [1]})
    )
    first, _, middle, _, last = net
    assert (first.out_channels, middle.in_channels, middle.groups, middle.out_channels) == (
        6,
        6,
        3,
        3,
    )
    assert last.in_channels == 3
    assert middle.weight.shape == (3, 2, 3, 3)
    net, graph, _, _ = build("norms of groups")
    exact = {group.name: [0] for group in graph.groups if group.prunable and group.exact}
    prunekit.apply_plan(net, graph, prunekit.PruningPlan(exact))
    assert (net[1].num_groups, net[1].num_channels, net[4].num_features) == (3, 9, 3)
    net, graph, _, _ = build("vision transformer")
    prunekit.apply_plan(net, graph, prunekit.PruningPlan({"attention": [2]}))
    assert (net.h, net.d, net.qkv.out_features, net.proj.in_features) == (3, 6, 54, 18)


def test_a_gradient_and_a_buffer_are_cut_too():
    net, graph, x, _ = build("buffers")
    net(x).sum().backward()
    name = next(group.name for group in graph.groups if group.prunable)
    gradient = net.second.weight.grad.clone()
    prunekit.apply_plan(net, graph, prunekit.PruningPlan({name: [0, 5]}))
    assert torch.equal(net.second.weight.grad, gradient[:, [1, 2, 3, 4, 6, 7]])
    assert net.scale.shape == (6,)
    assert net.mask.shape == (1, 1, 6)
    assert "mask" in net.state_dict(), "it can't be made anew in this size"


def test_a_size_read_where_nobody_can_see_it_is_refused_and_undone():
    class Secret(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.second(self.first(x).view(*x.shape[:-1], 2, 4).flatten(-2))

    net = randomise(Secret())
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    graph = prunekit.trace(net, (torch.randn(ROWS),))
    groups = {group.num_units: group.name for group in graph.groups if group.prunable}
    with pytest.raises(SurgeryError, match=f"{groups[4]}: the cut model doesn't run"):
        prunekit.apply_plan(net, graph, prunekit.PruningPlan({groups[4]: [0]}))
    assert all(torch.equal(before[name], parameter) for name, parameter in net.named_parameters())
    assert (net.first.out_features, net.second.in_features) == (8, 8)
