"""Random residual networks of linear, convolution, norm, split, concatenation and attention: pruned
equals masked.
"""

import copy

import torch
import torch.nn.functional as F
from conftest import randomise, zero_units
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunekit

WIDTHS = st.sampled_from([4, 6, 8, 12])


class Attention(nn.Module):
    """Grouped-query attention, fused or not, of a stream as wide as it comes."""

    def __init__(self, width, kv_heads, repeats, head_dim, fused, sdpa):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.sdpa = (
            kv_heads * repeats,
            kv_heads,
            head_dim,
            sdpa,
        )
        sizes = [count * head_dim for count in (self.num_heads, kv_heads, kv_heads)]
        if fused:
            self.qkv = nn.Linear(width, sum(sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(width, size) for size in sizes)
        self.fused, self.out, self.scale = fused, nn.Linear(sizes[0], width), 0.4

    def forward(self, x):
        if self.fused:
            sizes = [
                count * self.head_dim
                for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
            ]
            parts = self.qkv(x).split(sizes, -1)
        else:
            parts = self.q(x), self.k(x), self.v(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        if self.sdpa:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True)
        else:
            repeats = self.num_heads // self.num_kv_heads
            k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
            mixed = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, inner, gated):
        super().__init__()
        self.up, self.down, self.gated = (
            nn.Linear(width, inner * (1 + gated)),
            nn.Linear(inner, width),
            gated,
        )

    def forward(self, x):
        if not self.gated:
            return self.down(self.up(x).relu())
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Split(nn.Module):
    """One half goes through a layer, both come back together in the other order."""

    def __init__(self, layer, dim):
        super().__init__()
        self.layer, self.dim = layer, dim

    def forward(self, x):
        first, second = x.chunk(2, self.dim)
        return torch.cat([second, self.layer(first)], self.dim)


class Skip(nn.Module):
    """The stream beside, or plus, what a layer makes of it."""

    def __init__(self, layer, dim=None):
        super().__init__()
        self.layer, self.dim = layer, dim

    def forward(self, x):
        made = self.layer(x)
        return x + made if self.dim is None else torch.cat([x, made], self.dim)


@st.composite
def sequences(draw):
    """A network on [batch, places, features]."""
    width = draw(WIDTHS)
    layers = [nn.Linear(5, width)]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(["linear", "attention", "mlp", "split", "concatenate", "norm", "twice"])
        )
        if kind == "linear":
            layers += [nn.Linear(width, new := draw(WIDTHS)), nn.GELU()]
            width = new
        elif kind == "attention":
            shape = (
                draw(st.sampled_from([1, 2, 3])),
                draw(st.sampled_from([1, 2])),
                draw(st.sampled_from([2, 4])),
            )
            layers.append(Skip(Attention(width, *shape, draw(st.booleans()), draw(st.booleans()))))
        elif kind == "mlp":
            layers.append(Skip(Mlp(width, draw(WIDTHS), draw(st.booleans()))))
        elif kind == "split":
            layers.append(
                Split(nn.Sequential(nn.Linear(width // 2, new := draw(WIDTHS)), nn.Tanh()), -1)
            )
            width = width // 2 + new
            width += width % 2 and (layers.append(nn.Linear(width, width + 1)) or 1)
        elif kind == "concatenate":
            layers.append(Skip(nn.Linear(width, new := draw(WIDTHS)), -1))
            width += new
        elif kind == "norm":
            layers.append(draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))(width))
        else:  # one block run twice
            layers += [Skip(Mlp(width, draw(WIDTHS), False))] * 2
    return nn.Sequential(*layers, nn.Linear(width, 3)), torch.randn(2, 3, 5)


@st.composite
def images(draw):
    """A network on [batch, channels, height, width]."""
    width = draw(WIDTHS)
    layers = [nn.Conv2d(3, width, 1)]
    kinds = [
        "convolution",
        "depthwise",
        "grouped",
        "residual",
        "split",
        "concatenate",
        "batches",
        "groups",
        "up",
    ]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(kinds))
        if kind == "convolution":
            layers += [nn.Conv2d(width, new := draw(WIDTHS), 3, padding=1), nn.ReLU()]
            width = new
        elif kind == "depthwise":
            layers.append(nn.Conv2d(width, width, 3, padding=1, groups=width))
        elif kind == "grouped":
            layers.append(nn.Conv2d(width, new := 2 * draw(st.integers(1, 4)), 1, groups=2))
            width = new
        elif kind == "residual":
            inner = draw(WIDTHS)
            body = (
                nn.Conv2d(width, inner, 1),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                nn.Conv2d(inner, width, 3, padding=1),
            )
            layers.append(Skip(nn.Sequential(*body)))
        elif kind == "split":
            layers.append(Split(nn.Conv2d(width // 2, width // 2, 1), 1))
        elif kind == "concatenate":
            layers.append(
                Skip(nn.Sequential(nn.Conv2d(width, new := draw(WIDTHS), 1), nn.Sigmoid()), 1)
            )
            width += new
        elif kind == "batches":
            layers.append(nn.BatchNorm2d(width))
        elif kind == "groups":
            layers.append(nn.GroupNorm(2, width))
        else:
            layers.append(nn.ConvTranspose2d(width, new := draw(WIDTHS), 2, stride=2))
            width = new
    head = draw(
        st.sampled_from(
            [
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)),
                nn.Conv2d(width, 3, 1),
            ]
        )
    )
    return nn.Sequential(*layers, head), torch.randn(2, 3, 4, 4)


@given(st.one_of(sequences(), images()), st.data())
@settings(max_examples=80)
def test_pruned_equals_masked(network, data):
    net, x = network
    net = randomise(net, 0.4)
    graph = prunekit.trace(net, (x,))
    plan = {}
    for group in graph.groups:
        if group.prunable:
            chosen = st.lists(
                st.integers(0, group.num_units - 1), unique=True, max_size=group.num_units - 1
            )
            plan[group.name] = data.draw(chosen)
    plan = {name: units for name, units in plan.items() if units}
    exact = {name: units for name, units in plan.items() if graph[name].exact}
    fixed = {
        name for name in exact if graph[name].kind == "head_dim"
    }  # one attribute, three widths
    exact = {name: units for name, units in exact.items() if name not in fixed}
    masked = zero_units(copy.deepcopy(net), graph, exact)
    pruned = copy.deepcopy(net)
    prunekit.apply_plan(pruned, graph, prunekit.PruningPlan(exact))
    with torch.no_grad():
        expected = masked(x)
        torch.testing.assert_close(
            pruned(x), expected, rtol=1e-3, atol=1e-3 * max(expected.abs().max().item(), 1)
        )
    gone = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in pruned.parameters())
    assert gone == graph.removed_parameters(exact)
    for (
        name,
        units,
    ) in plan.items():  # and each alone, the inexact ones too: it runs, or surgery would say so
        if name not in fixed:
            prunekit.apply_plan(copy.deepcopy(net), graph, prunekit.PruningPlan({name: units}))
