"""Weights that are used more than once: every use counts, and all are cut together."""

import copy

import pytest
import torch
from conftest import randomise
from torch import nn

import prunekit
from prunekit.calibration.activations import gather_input_statistics


class Mixer(nn.Module):
    """A layer with an FFN that it adds to the stream, once or twice."""

    def __init__(self, bias, times=1):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6, bias=bias)
        self.times = times

    def forward(self, hidden_states):
        for _ in range(self.times):
            hidden_states = hidden_states + self.down(self.up(hidden_states).tanh())
        return hidden_states


class Stack(nn.Module):
    """Three layers; the first and the last are modules that hold the same parameters, if `tied`."""

    def __init__(self, tied=True, bias=True, own_bias=False, times=1):
        super().__init__()
        self.layers = nn.ModuleList(Mixer(bias, times if i == 0 else 1) for i in range(3))
        self.head = nn.Linear(6, 3)
        if tied:
            first, last = self.layers[0], self.layers[2]
            last.up = first.up
            last.down.weight = first.down.weight
            if not own_bias:
                last.down.bias = first.down.bias

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build(**options):
    torch.manual_seed(0)
    return randomise(Stack(**options), 1).double()


def fed(model, x, paths):
    """What these modules are fed, one use below the other [tokens, n], without units that went."""
    seen = []
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for path in paths
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return torch.cat([one.flatten(0, -2) for one in seen])


def mask(dense, pruned, removed):
    """The dense model with a pruned one's weights at the units that stay, zeros at the others."""
    masked = copy.deepcopy(dense)
    for path, units in removed.items():
        kept = [j for j in range(12) if j not in units]
        own, cut = masked.get_submodule(path), pruned.get_submodule(path)
        own.weight.data.zero_()[:, kept] = cut.weight.data
        own.bias = cut.bias
    return masked


def assert_least_squares(inputs, dense, pruned, units):
    """The columns that stay are the least squares for the dense outputs on these inputs."""
    kept = [j for j in range(12) if j not in units]
    wanted = inputs @ dense.weight.data.T
    best = torch.linalg.lstsq(inputs[:, kept], wanted).solution.T
    torch.testing.assert_close(pruned.weight.data, best, rtol=1e-6, atol=1e-6)


FIRST, SECOND, THIRD = (f"layers.{i}.down" for i in range(3))


@pytest.mark.parametrize(
    ("options", "uses"),
    [({}, [FIRST, THIRD]), ({"tied": False, "times": 2}, [FIRST])],
    ids=["two modules", "one module twice"],
)
def test_every_use_of_a_weight_counts_and_other_layers_see_it_cut(options, uses):
    dense, x = build(**options), torch.randn(8, 16, 6, dtype=torch.float64)
    pruned = copy.deepcopy(dense)
    exact = ["schedule.damping=0"]
    calibration = [{"x": x[:4]}, {"x": x[4:]}]
    result = prunekit.prune(pruned, ratio=0.3, calibration=calibration, overrides=exact)
    removed = {f"{name}.down": units for name, units in result.plan.removed.items()}
    assert removed[FIRST]
    assert removed[SECOND]
    inputs = fed(dense, x, uses)
    assert len(inputs) == 2 * 8 * 16
    (one,) = gather_input_statistics(dense, ["layers.0.down.weight"], calibration).values()
    torch.testing.assert_close(one.norm(), inputs.norm(dim=0))
    assert_least_squares(inputs, dense.layers[0].down, pruned.layers[0].down, removed[FIRST])

    removed |= dict.fromkeys(uses, removed[FIRST])
    early = mask(dense, pruned, {path: removed[path] for path in uses})
    inputs = fed(early, x, [SECOND])
    assert_least_squares(inputs, dense.layers[1].down, pruned.layers[1].down, removed[SECOND])
    torch.testing.assert_close(pruned(x), mask(dense, pruned, removed)(x))


@pytest.mark.parametrize("repair", ["compensation.bias=true", "compensation=bias"])
@pytest.mark.parametrize("options", [{"bias": False}, {"own_bias": True}, {}])
def test_biases_change_in_all_modules_that_hold_the_weight(options, repair):
    dense, x = build(**options), torch.randn(8, 16, 6, dtype=torch.float64)
    pruned = copy.deepcopy(dense)
    result = prunekit.prune(pruned, ratio=0.3, calibration=[{"x": x}], overrides=[repair])
    removed = {f"{name}.down": units for name, units in result.plan.removed.items()}
    removed[THIRD] = removed[FIRST]
    torch.testing.assert_close(pruned(x), mask(dense, pruned, removed)(x))
    before, after = ([m.layers[i].down.bias for i in (0, 2)] for m in (dense, pruned))
    if after[0] is None:
        assert repair == "compensation.bias=true"
        assert after[1] is None
    else:
        first, third = (a if b is None else a - b for a, b in zip(after, before, strict=True))
        torch.testing.assert_close(first, third)
        assert first.norm() > 1e-3
    assert (before[0] is before[1]) == (after[0] is after[1]) or before[0] is None
