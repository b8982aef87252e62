"""Routers that look at numbers are captured in their dense form; failures are put in words."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise, zero_units
from torch import nn

import prunekit
from prunekit.errors import TraceError, first_line


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


class Skipping(nn.Module):
    """Experts in a list, passed over where no token was sent to them."""

    def __init__(self, has_none):
        super().__init__()
        self.router, self.head = nn.Linear(6, 3), nn.Linear(6, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)) for _ in range(3)
        )
        self.has_none = has_none

    def forward(self, x):
        chosen, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            sent = chosen == number
            if not self.has_none(sent):
                out[sent] = expert(x[sent])
        return self.head(x + out)


@pytest.mark.parametrize(
    "has_none",
    [lambda sent: not sent.any(), lambda sent: sent.sum() == 0, lambda sent: sent.sum().item() < 1],
)
def test_experts_that_are_passed_over_are_traced_and_cut(has_none):
    model, x = randomise(Skipping(has_none), 0.3).eval(), torch.randn(8, 6)
    masked = copy.deepcopy(model)
    result = prunekit.prune(model, ratio=0.2, method="magnitude", calibration=[{"x": x}])
    zero_units(masked, result.graph, result.plan.removed)
    assert {result.graph[name].kind for name in result.plan.removed} == {"mlp"}
    torch.testing.assert_close(model(x), masked(x))


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


class Named(nn.Module):
    """Experts that a loop finds by their names, and a mask that is made unless it is compiled
    (Switch); the router is cast to single precision, mostly what it has been (NLLB-MoE)."""

    def __init__(self):
        super().__init__()
        self.embedding, self.router, self.head = (
            nn.Embedding(20, 6),
            nn.Linear(6, 2),
            nn.Linear(6, 3),
        )
        self.experts = nn.ModuleDict(
            {
                f"expert_{i}": nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))
                for i in range(2)
            }
        )

    def forward(self, input_ids, attention_mask=None):
        if attention_mask is None and not torch.compiler.is_compiling():
            attention_mask = torch.ones_like(input_ids)
        x, mask = self.embedding(input_ids).flatten(0, 1), attention_mask[..., None].flatten(0, 1)
        self.router = self.router.to(torch.float32)
        sent = F.one_hot(self.router(x.float()).argmax(-1), 2).T
        out = torch.zeros_like(x)
        for expert in (sent.sum(1) > 0).nonzero():
            (token,) = torch.where(sent[expert[0]])
            out.index_add_(0, token, self.experts[f"expert_{expert[0]}"](x[token]))
        return self.head((x + out) * mask)


def test_a_module_that_a_pass_casts_to_another_type_is_traced():
    model = Named().bfloat16()
    ids = torch.randint(0, 20, (4, 6))
    graph = prunekit.trace(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert {f"experts.expert_{i}" for i in (0, 1)} <= {g.module for g in graph.groups if g.prunable}
    assert model.router.weight.dtype == torch.bfloat16


def test_experts_by_name_and_masks_that_are_made_are_traced_and_cut():
    torch.manual_seed(0)
    model, ids = randomise(Named(), 0.3).eval(), torch.randint(0, 20, (4, 6))
    masked = copy.deepcopy(model)
    result = prunekit.prune(model, ratio=0.2, method="magnitude", calibration=[{"input_ids": ids}])
    zero_units(masked, result.graph, result.plan.removed)
    names = {f"experts.expert_{i}" for i in range(2)}
    assert names == {result.graph[name].module for name in result.plan.removed}
    torch.testing.assert_close(model(ids), masked(ids))


class Marked(nn.Module):
    """A classifier of what stands at a mark, 2, which each text must hold (BART); `apart`: tokens
    go through one adapter or another (XMOD)."""

    def __init__(self, apart=False):
        super().__init__()
        self.apart, self.embedding = apart, nn.Embedding(20, 6)
        self.adapters = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
                for name in ["marked", "plain"][: 1 + apart]
            }
        )
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids):
        at, x = input_ids.eq(2), self.embedding(input_ids)
        if self.apart:
            made = torch.zeros_like(x)
            for mask, adapter in zip((at, ~at), self.adapters.values(), strict=True):
                made[mask] = adapter(x[mask])
            return self.head((x + made).mean(1))
        if at.device.type != "meta" and not at.any():
            raise ValueError("no mark")
        marks = self.adapters["marked"](x)[at, :].view(len(x), -1, x.shape[-1])
        return self.head(marks[:, -1])


@pytest.mark.parametrize("apart", [False, True])
def test_what_a_mask_chooses_is_pruned(apart):
    """The text is traced whole where its first eight tokens hold no mark."""
    torch.manual_seed(0)
    model, unmarked = randomise(Marked(apart)).eval(), torch.randint(3, 20, (8, 12))
    ids = unmarked.index_fill(1, torch.tensor([10]), 2)
    masked, batch = copy.deepcopy(model), {"input_ids": ids}
    options = {"ratio": 0.2, "method": "magnitude", "overrides": ["groups=mlp", "policy=uniform"]}
    result = prunekit.prune(model, calibration=[batch], **options)
    assert all(len(adapter[0].weight) < 8 for adapter in model.adapters.values())
    zero_units(masked, result.graph, result.plan.removed)
    torch.testing.assert_close(model(ids.flip(0)), masked(ids.flip(0)))
    if not apart:
        with pytest.raises(TraceError, match="does not run on two samples.*ValueError: no mark"):
            prunekit.prune(Marked(), calibration=[{"input_ids": unmarked}], **options)


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
    match = r"aten\.slice\.Tensor .* takes numbers from the data.*; a module in it that does"
    with pytest.raises(TraceError, match=match):
        prunekit.trace(Shortened(), (torch.randn(4, 6),))


@pytest.mark.parametrize("traceback", ["", "1"])
def test_what_can_not_be_captured_is_told_in_one_line(traceback, monkeypatch, capfd):
    monkeypatch.setenv("PRUNEKIT_TRACEBACK", traceback)
    match = r"goes on by numbers.* \(\S+test_choices.py, line \d+\); a module in it[^\n]*$"
    with pytest.raises(TraceError, match=match):
        prunekit.trace(Branching(), (torch.randn(4, 6),))
    with pytest.raises(TraceError, match=r"AssertionError.*test_choices.py, line \d+\);[^\n]*$"):
        prunekit.trace(Silent(), (torch.randn(4, 6),))
    assert traceback or capfd.readouterr() == ("", "")


def test_a_module_in_what_can_not_be_traced_is_pruned_by_itself():
    """As the message says: the module around it runs with what is left."""

    class Around(Branching):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6))

        def forward(self, x):
            return super().forward(x + self.inner(x))

    model, x = Around(), torch.randn(4, 6)
    inner = [{"input": x}]
    prunekit.prune(model.inner, ratio=0.2, method="magnitude", calibration=inner)
    assert model.inner[0].out_features < 20
    assert model(x).isfinite().all()


class Stateful(nn.Module):
    """Makes its first state without saying on which device."""

    def __init__(self):
        super().__init__()
        self.into, self.hidden = nn.Linear(6, 20), nn.Linear(20, 6)

    def forward(self, x):
        state = torch.zeros(len(x), 6)
        for _ in range(2):
            state = x + self.hidden(self.into(state).relu())
        return state


def test_tensors_made_without_a_device_do_not_stop_a_trace():
    model, x = randomise(Stateful(), 0.1), torch.randn(4, 6)
    masked = copy.deepcopy(model)
    result = prunekit.prune(model, ratio=0.2, method="magnitude", calibration=[{"x": x}])
    zero_units(masked, result.graph, result.plan.removed)
    assert model.into.out_features < 20
    torch.testing.assert_close(model(x), masked(x))


def test_an_error_in_one_line_keeps_what_its_colon_announces():
    error = ImportError("\nIt needs timm. Install it by:\n`pip install timm`. Then restart.\nMore.")
    assert first_line(error) == "It needs timm. Install it by: `pip install timm`. Then restart."
    assert first_line(ValueError("one\ntwo"), named=True) == "ValueError: one"
