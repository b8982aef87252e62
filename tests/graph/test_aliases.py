"""Operators under other names, complex numbers, windows; and the advice where there is no rule."""

import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, zero_units
from torch import nn

import prunekit
from prunekit.errors import TraceError
from prunekit.graph import operators


class Between(nn.Module):
    """Two linear modules and a function between them, which is given their channels twice."""

    def __init__(self, between, out=12):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(out, 3)
        self.between = between

    def forward(self, x):
        return self.down(self.between(self.up(x), self.gate(x)))


ALIASES = {
    "multiply": (torch.multiply, torch.mul),
    "subtract": (torch.subtract, torch.sub),
    "divide": (torch.divide, torch.div),
    "concat": (lambda a, b: torch.concat([a, b], -1), lambda a, b: torch.cat([a, b], -1)),
    "concatenate": (lambda a, b: torch.concatenate([a, b], -1), lambda a, b: torch.cat([a, b], -1)),
    "reshape_as": (lambda a, b: a.reshape_as(b) + b, torch.add),
    "clip": (lambda a, b: a.clip(-1, 1) * b, lambda a, b: a.clamp(-1, 1) * b),
    "negative": (lambda a, b: a.negative() + b, lambda a, b: a.neg() + b),
    "absolute": (lambda a, b: a.absolute() * b, lambda a, b: a.abs() * b),
    "expit": (lambda a, b: torch.special.expit(a) * b, lambda a, b: a.sigmoid() * b),
    "arctan": (lambda a, b: a.arctan() * b, lambda a, b: a.atan() * b),
    "greater": (
        lambda a, b: torch.where(torch.greater(a, 0), a, b),
        lambda a, b: torch.where(a > 0, a, b),
    ),
    "multiply_": (lambda a, b: (a + 0).multiply_(b), lambda a, b: (a + 0).mul_(b)),
    "moveaxis": (
        lambda a, b: (a.view(4, 3, 4).moveaxis(1, 0).moveaxis(0, 1)).reshape(4, 12) * b,
        lambda a, b: (a.view(4, 3, 4).movedim(1, 0).movedim(0, 1)).reshape(4, 12) * b,
    ),
    "mH": (lambda a, b: a.view(4, 3, 4).mH.flatten(1), lambda a, b: a.view(4, 3, 4).mT.flatten(1)),
}


def groups_of(function, name):
    model = randomise(Between(function, 24 if name.startswith("concat") else 12))
    return model, prunekit.trace(model, (torch.randn(4, 5),))


@pytest.mark.parametrize("name", ALIASES)
def test_an_operator_under_another_name_is_followed_alike(name):
    (_, alias), (_, usual) = (groups_of(function, name) for function in ALIASES[name])
    assert alias.fingerprint == usual.fingerprint
    assert [(g.prunable, g.exact) for g in alias.groups] == [
        (g.prunable, g.exact) for g in usual.groups
    ]
    assert any(group.prunable for group in alias.groups)


def transpose_matrices(a, b):
    return a.view(len(a), -1, 4).mT.flatten(1) * b


def test_a_transposed_batch_of_matrices_keeps_its_batch():
    x = torch.randn(4, 5)
    model = randomise(Between(transpose_matrices))
    graph = prunekit.trace(model, (x,))
    (rows,) = (group for group in graph.groups if group.num_units == 3 and group.prunable)
    masked = zero_units(randomise(Between(transpose_matrices)), graph, {rows.name: [1]})
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({rows.name: [1]}))
    torch.testing.assert_close(model(x), masked(x))


class Rotated(nn.Module):
    """Attention whose queries and keys are turned as complex numbers."""

    def __init__(self, heads=4):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.heads = heads
        self.register_buffer("frequencies", torch.rand(2))

    def turn(self, x):
        angles = torch.outer(torch.arange(x.shape[2], device=x.device), self.frequencies)
        turns = torch.polar(torch.ones_like(angles), angles)
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(3)

    def forward(self, x):
        q, k, v = (
            own(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for own in (self.q, self.k, self.v)
        )
        weights = (self.turn(q) @ self.turn(k).transpose(2, 3) / 2).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def test_heads_that_are_turned_as_complex_numbers_are_pruned():
    x = torch.randn(2, 5, 16)
    graph = prunekit.trace(randomise(Rotated()), (x,))
    (heads,) = (group for group in graph.groups if group.kind == "attention")
    assert (heads.num_units, heads.prunable, heads.exact) == (4, True, True)
    pruned = randomise(Rotated())
    prunekit.apply_plan(pruned, graph, prunekit.PruningPlan({heads.name: [1]}))
    masked = zero_units(randomise(Rotated()), graph, {heads.name: [1]})
    torch.testing.assert_close(pruned(x), masked(x))


class Patches(nn.Module):
    """Channels whose windows are taken apart, in time or in space."""

    def __init__(self, unfold):
        super().__init__()
        self.up, self.down, self.unfold = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, 1), unfold

    def forward(self, x):
        return self.down(self.unfold(self.up(x).relu()))


@pytest.mark.parametrize(
    "unfold",
    [
        lambda x: x.unfold(3, 2, 2).sum(-1),
        lambda x: F.unfold(x, 2).view(len(x), -1, 4, 9).sum(2).unsqueeze(-1),
        lambda x: torch.fft.rfft2(x).real.tile(2),
    ],
    ids=["unfold", "im2col", "fourier"],
)
def test_channels_of_windows_are_pruned(unfold):
    x = torch.randn(2, 2, 4, 4)
    graph = prunekit.trace(randomise(Patches(unfold)), (x,))
    (channels,) = (g for g in graph.groups if g.prunable)
    assert channels.num_units == 6
    pruned = randomise(Patches(unfold))
    prunekit.apply_plan(pruned, graph, prunekit.PruningPlan({channels.name: [1, 4]}))
    masked = zero_units(randomise(Patches(unfold)), graph, {channels.name: [1, 4]})
    torch.testing.assert_close(pruned(x), masked(x))


UNKNOWN = {
    "one output": lambda a, b: torch.erfinv(a.tanh() * 0.9) + b,
    "another shape": lambda a, b: F.pad(torch.diff(a), (0, 1)) + b,
    "a reduction": lambda a, b: a.nanmedian() + b,
    "several outputs": lambda a, b: torch.frexp(a)[0] + b,
    "a list": lambda a, b: torch.cat(torch.hsplit(a, 2), -1) + b,
}


@pytest.mark.parametrize("kind", [*UNKNOWN, "a rule that does not fit"])
def test_the_rule_that_an_error_shows_holds(kind, monkeypatch):
    monkeypatch.setattr(operators, "_RULES", dict(operators._RULES))
    function = UNKNOWN.get(kind, UNKNOWN["another shape"])
    if kind not in UNKNOWN:
        prunekit.graph.operator_rule("aten.diff")(lambda call: call.elementwise(*call.inputs()))
    with pytest.raises(TraceError, match="does not fit" if kind not in UNKNOWN else "no rule") as e:
        groups_of(function, kind)
    advice = textwrap.dedent(re.split("register one:\n", str(e.value))[1])
    exec(advice, {"prunekit": prunekit})
    model, graph = groups_of(function, kind)
    x = torch.randn(4, 5)
    prunable = [group for group in graph.groups if group.prunable]
    went_through = {"up.weight", "up.bias"}
    assert went_through.isdisjoint(m.parameter for group in prunable for m in group.members)
    assert len(prunable) == (kind == "a reduction")  # whose other operand keeps its axis
    for group in prunable:
        masked = zero_units(randomise(Between(function)), graph, {group.name: [0]})
        prunekit.apply_plan(model, graph, prunekit.PruningPlan({group.name: [0]}))
        torch.testing.assert_close(model(x), masked(x))
