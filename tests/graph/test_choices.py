"""Routers that look at numbers are captured in their dense form; failures are put in words."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, zero_units
from torch import nn

import prunekit
from prunekit.errors import TraceError


class Looped(nn.Module):
    """Experts in a loop over those that were chosen, each on the tokens that were sent to it."""

    def __init__(self, spare=0, whole=False):
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.up = nn.Parameter(torch.randn(4, 8, 6))
        self.down = nn.Parameter(torch.randn(4, 6, 8))
        self.spare, self.whole, self.head = spare, whole, nn.Linear(6, 3)

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        sent = F.one_hot(chosen, 4 + self.spare).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for expert in (sent.sum((1, 2)) > 0).nonzero():
            index = int(expert.item()) if self.whole else expert[0]
            if self.whole and index >= 4:
                continue
            place, token = torch.where(sent[index])
            hidden = F.linear(F.linear(x[token], self.up[index]).relu(), self.down[index])
            out.index_add_(0, token, hidden * weights[token, place, None])
        return self.head(x + out)


class Counted(nn.Module):
    """Experts that are given tokens sorted by their expert, in parts as long as was counted."""

    def __init__(self):
        super().__init__()
        self.router, self.head = nn.Linear(6, 4), nn.Linear(6, 3)
        self.up = nn.Parameter(torch.randn(4, 8, 6))
        self.down = nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        counts = (
            torch.zeros(len(x), 4, device=x.device).scatter(1, chosen, 1.0).long().sum(0).tolist()
        )
        order = chosen.flatten().sort(0)[1]
        token = order.div(2, rounding_mode="trunc")
        parts = x[token].split(counts, 0)
        hidden = [F.linear(part, self.up[i]).relu() for i, part in enumerate(parts)]
        made = torch.cat([F.linear(part, self.down[i]) for i, part in enumerate(hidden)])
        made = made * weights.flatten()[order][:, None]
        return self.head(x + torch.zeros_like(x).index_add(0, token, made))


@pytest.mark.parametrize("options", [(), (1,), (2, True)], ids=str)
def test_experts_that_look_at_numbers_are_traced_and_cut(options):
    torch.manual_seed(0)
    model, x = randomise(Looped(*options)), torch.randn(8, 6)
    graph = prunekit.trace(model, (x,))
    (width,) = [group for group in graph.groups if group.num_units == 8]
    assert {(m.parameter, m.dim) for m in width.members} == {("up", 1), ("down", 2)}
    assert width.prunable and width.exact
    fixed = [group for group in graph.groups if group.num_units == 4]
    assert not any(group.prunable for group in fixed), "a router without its experts"
    removed = {width.name: [1, 2]}
    masked = zero_units(copy.deepcopy(model), graph, removed)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    other = torch.randn(16, 6)
    torch.testing.assert_close(model(other), masked(other))


class Parted(nn.Module):
    """Channels in parts, one of them empty, as of a head that is rotary as a whole."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        empty, turned, rest = self.up(x).relu().split([0, 8, 0], -1)
        return self.down(torch.cat([empty, turned * 2, rest], -1))


def test_a_part_may_be_empty():
    graph = prunekit.trace(Parted(), (torch.randn(4, 6),))
    (width,) = [group for group in graph.groups if group.num_units == 8]
    assert {(m.parameter, m.dim) for m in width.members} == {
        ("up.weight", 0),
        ("up.bias", 0),
        ("down.weight", 1),
    }


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.forward_without_looking(-x if x.sum() > 0 else x)

    def forward_without_looking(self, x):
        return self.down(self.up(x).relu())


class Shortened(Branching):
    def forward(self, x):
        number = x.argmax().item()
        torch._check_is_size(number)
        torch._check(number <= 3)
        return self.forward_without_looking(x)[:, :number]


class Silent(Branching):
    def forward(self, x):
        assert x.device.type != "meta"
        return super().forward(x)


def test_a_number_from_the_data_is_told_with_its_operator():
    with pytest.raises(TraceError, match=r"aten\.slice\.Tensor .* takes a number from the data"):
        prunekit.trace(Shortened(), (torch.randn(4, 6),))


@pytest.mark.parametrize("traceback", ["", "1"])
def test_what_can_not_be_captured_is_told_in_one_line(traceback, monkeypatch, capfd):
    monkeypatch.setenv("PRUNEKIT_TRACEBACK", traceback)
    with pytest.raises(TraceError, match=r"goes on by numbers.* \(\S+test_choices.py, line \d+\)$"):
        prunekit.trace(Branching(), (torch.randn(4, 6),))
    with pytest.raises(TraceError, match=r"AssertionError.*test_choices.py, line \d+\)$"):
        prunekit.trace(Silent(), (torch.randn(4, 6),))
    assert traceback or capfd.readouterr() == ("", "")
