"""Layers one by one, in one pass, against forward passes of the whole model."""

import copy
import gc
from collections import Counter
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from conftest import inputs_of, tiny_llama, token_ids
from families import EXPERTS, FIRST, build
from operations import Counting
from torch import nn

import prunekit
from prunekit.calibration import calls
from prunekit.calibration import walk as walking
from prunekit.calibration.blocks import Finder
from prunekit.calibration.consumers import Consumer, find_consumers
from prunekit.calibration.layer_pass import LayerPass
from prunekit.calibration.moments import Moments
from prunekit.calibration.store import Store
from prunekit.errors import DataError
from prunekit.graph import Member, trace

FAMILIES = [
    "llama",
    "gpt2",
    "gpt_neox",
    "gemma2",
    "phi3",
    "opt",
    "falcon",
    "bloom",
    "cohere",
    "qwen3_moe",
    "mixtral",
]


def batches(ids, size=3):
    return [{"input_ids": chunk, "use_cache": False} for chunk in ids.split(size)]


def moments(model, groups, given, streamed, monkeypatch, **options):
    """Every site's Hessian while the consumers change on the way; and whether layers ran one by
    one.
    """
    said = []
    monkeypatch.setattr(walking, "say", said.append)
    if not streamed:
        monkeypatch.setattr(walking.Stream, "open", classmethod(lambda *_: None))
    found = []
    for group, sites in walking.Walk(model=model, groups=groups, batches=given, **options):
        for site in sites:
            found.append((group.name, site.moments.hessian.clone(), site.moments.tokens))
            for consumer in site.consumers:
                consumer.store(consumer.weight() * 0.5)
    monkeypatch.undo()
    return found, not said


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_gives_what_whole_models_give(family, monkeypatch):
    model = build(family, FIRST[family], "sdpa", "eager")
    graph = trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp") and g.prunable]
    other = copy.deepcopy(model)
    given = batches(token_ids(7, 9))
    left, one_by_one = moments(model, groups, given, True, monkeypatch)
    assert one_by_one
    right, whole = moments(other, groups, given, False, monkeypatch)
    assert not whole
    assert [name for name, *_ in left] == [name for name, *_ in right]
    for (_, one, count), (_, two, same) in zip(left, right, strict=True):
        assert count == same
        torch.testing.assert_close(one, two, rtol=2e-4, atol=2e-5 * float(two.abs().max()) + 1e-12)


@pytest.fixture
def untried(monkeypatch):
    """No two rows go through the layers before all others do."""
    monkeypatch.setattr(calls, "_equal_whole", lambda *_: (True, False))


@pytest.mark.usefixtures("untried")
def test_no_pass_is_made_twice():
    model = tiny_llama()
    ran = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.update([name]))
    graph = trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    ran.clear()
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    for _ in walking.Walk(model=model, groups=groups, batches=batches(token_ids(12, 9))):
        pass
    for layer in range(3):
        found = {name.rsplit(".", 1)[1]: n for name, n in ran.items() if f"layers.{layer}." in name}
        # Batches; that of the first layer's attention goes on to its end, to see what is fed twice.
        whole = layer == 0
        assert found["q_proj"] == found["k_proj"] == 4
        assert found["gate_proj"] == found["up_proj"] == 4 + whole
        assert found["o_proj"] == 4 + 1  # the first batch also tells what the block's output is
        assert found["down_proj"] == (4 + 1 if layer < 2 else 1) + whole
    assert not ran["lm_head"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("target", ["pruned", "residual"])
def test_a_device_is_not_waited_for_at_every_batch(target, padded):
    """With a GPU each of these waits leaves it without work, whatever the batch."""
    waits = []
    for size in (8, 2):
        model = tiny_llama()
        graph = trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
        groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
        targets = {} if target == "pruned" else {group.name: target for group in groups}
        given = batches(token_ids(24, 9), size)
        for batch in given if padded else ():
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["attention_mask"][1, 6:] = 0
        walk = iter(walking.Walk(model=model, groups=groups, batches=given, targets=targets))
        found = [next(walk)]  # the calls of the layers are recorded
        with Counting() as counting:
            found += list(walk)
        assert len(found) == len(groups)
        waits.append(counting.waited.total())
    assert waits[0] == waits[1]
    # For each group its moments, and whether its output is added to the stream, tried on a batch or
    # two; for each layer but the last its outputs.
    assert waits[0] <= (1 + 2 * (target == "residual")) * len(groups) + 2


@pytest.mark.usefixtures("untried")
def test_the_dense_stream_begins_where_something_is_cut():
    """Up to there it is the pruned one; against a walk that cuts nothing in the first layer."""
    ran, found = Counter(), []
    for first in (0, 2):
        model = tiny_llama()
        graph = trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
        groups = [g for g in graph.groups if g.kind == "mlp" and g.layer >= first]
        for i, layer in enumerate(model.model.layers):
            layer.mlp.gate_proj.register_forward_hook(lambda *_, i=i: ran.update([i]))
        given, targets = batches(token_ids(24, 9)), {group.name: "residual" for group in groups}
        ran.clear()
        for group, (site,) in walking.Walk(
            model=model, groups=groups, batches=given, targets=targets
        ):
            if group.layer == 2:
                found.append((site.moments.cross.clone(), site.held.hessian.clone()))
    assert ran[0] == ran[1] == len(given)
    assert ran[2] > len(given)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_a_target_is_that_of_the_block_alone_where_the_other_one_stays_whole():
    """The residual stream behind each attention, from passes of whole models: FFNs are not cut."""
    model, ids = tiny_llama(), token_ids(24, 9)
    dense = copy.deepcopy(model)
    graph = trace(model, {"input_ids": ids[:2, :7], "use_cache": False})
    groups = [g for g in graph.groups if g.kind == "attention"]
    walk = walking.Walk(
        model=model,
        groups=groups,
        batches=batches(ids),
        targets={group.name: "residual" for group in groups},
        around=graph.groups,
    )
    visited = []
    for group, (site,) in walk:
        layer = f"model.layers.{group.layer}"
        x = inputs_of(model, f"{layer}.self_attn.o_proj", ids)
        behind = [inputs_of(m, f"{layer}.post_attention_layernorm", ids) for m in (dense, model)]
        ridge = torch.eye(x.shape[1]).double()  # some directions are hardly ever seen
        wanted = torch.cat([behind[0] - behind[1], torch.zeros(len(ridge), 48).double()])
        step = torch.linalg.lstsq(torch.cat([x, ridge]), wanted).solution
        site.merge_held_out()
        hessian, cross = site.moments.hessian.double(), site.moments.cross.double()
        found = torch.linalg.solve(hessian + ridge / len(x), cross.T)
        torch.testing.assert_close(found, step, rtol=1e-3, atol=1e-5)
        visited.append((group, step.abs().max().item()))
        (consumer,) = site.consumers
        consumer.store(consumer.weight() * 0.5)
    assert [group for group, _ in visited] == groups
    assert [size > 0.01 for _, size in visited] == [False, True, True]


@pytest.mark.parametrize("budget", [0, 20_000])
def test_activations_in_files_change_nothing(budget, tmp_path):
    ids = token_ids(12, 10)
    plain, filed = tiny_llama(), tiny_llama()
    one = prunekit.prune(plain, calibration=ids)
    two = prunekit.prune(filed, calibration=ids, overrides=[f"memory.budget={budget}"])
    assert one.plan == two.plan
    for left, right in zip(plain.parameters(), filed.parameters(), strict=True):
        assert torch.equal(left, right)
    store = Store(budget=budget, folder=tmp_path / "activations")
    kept = [store.put(torch.full((100, 10), float(i)).to(torch.bfloat16)) for i in range(20)]
    assert store.used["device"] <= budget
    assert all((tensor.get() == i).all() for i, tensor in enumerate(kept))
    for tensor in kept:
        tensor.free()
    assert set(store.used.values()) == {0}
    store.close()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_leaves_the_model_as_it_was(monkeypatch, tmp_path):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Store, "_write", _full)
    with pytest.raises(DataError, match=r"memory.folder.*No space left"):
        prunekit.prune(model, calibration=token_ids(), overrides=["memory.budget=0"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _full(self, tensor):
    raise DataError(
        "memory.folder: x can't hold 1 more bytes of activations: No space left on device"
    )


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("family", EXPERTS)
def test_every_expert_has_the_moments_of_its_own_tokens(family, streamed, monkeypatch):
    model = build(family, FIRST[family], "sdpa")
    graph = trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    group = next(
        g for g in graph.groups if any(len(graph.shapes[m.parameter]) == 3 for m in g.consumers)
    )
    ids = token_ids(40, 30)
    consumers = find_consumers(model, group)
    if not streamed:
        monkeypatch.setattr(walking.Stream, "open", classmethod(lambda *_: None))
    ((_, sites),) = walking.Walk(model=model, groups=[group], batches=batches(ids, 10))
    assert len(sites) == len(consumers) == 4
    experts = model.get_submodule(consumers[0].name)
    routed = {}
    handle = experts.register_forward_pre_hook(
        lambda _, args, kwargs: routed.update(args=args), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    hidden, chosen = routed["args"][:2]
    for e, site in enumerate(sites):
        x = hidden[(chosen == e).any(-1)].double()
        gate, up = (x @ experts.gate_up_proj[e].detach().double().T).chunk(2, -1)
        fed = experts.act_fn(gate) * up
        assert site.moments.tokens == len(fed)
        torch.testing.assert_close(
            site.moments.hessian.double(), fed.T @ fed / len(fed), rtol=1e-3, atol=1e-6
        )


def test_experts_are_repaired_and_those_that_saw_too_little_take_what_all_saw(monkeypatch):
    said = []
    monkeypatch.setattr("prunekit.calibration.observe.say", said.append)
    results = {}
    for compensation in ("obs", "none"):
        model = build("mixtral", FIRST["mixtral"], "sdpa")
        ids = token_ids(30, 20)
        before = inputs_of(model, "lm_head", ids)
        prunekit.prune(
            model, calibration=ids, overrides=["groups=mlp", f"compensation={compensation}"]
        )
        results[compensation] = (inputs_of(model, "lm_head", ids) - before).square().mean().item()
    assert results["obs"] < 0.9 * results["none"]
    assert not said
    prunekit.prune(
        build("mixtral", FIRST["mixtral"], "sdpa"),
        calibration=token_ids(1, 30),
        overrides=["groups=mlp"],
    )
    assert said
    assert "experts that saw fewer tokens" in said[0]


def test_channels_feed_many_matrices_and_those_fed_the_same_share_a_site(monkeypatch):
    model = tiny_llama()
    graph = trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    channels = [g for g in graph.groups if g.kind == "channel"]
    ((_, sites),) = walking.Walk(model=model, groups=channels, batches=batches(token_ids(6, 9)))
    names = [[consumer.name.rpartition(".")[2] for consumer in site.consumers] for site in sites]
    assert names == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 3 + [["lm_head"]]
    ids, errors = token_ids(40, 16), {}
    for compensation in ("obs", "none"):
        model = tiny_llama()
        with torch.no_grad():
            before = model(input_ids=ids).logits
            prunekit.prune(
                model, calibration=ids, overrides=["groups=channel", f"compensation={compensation}"]
            )
            errors[compensation] = (model(input_ids=ids).logits - before).square().mean().item()
    assert errors["obs"] < 0.8 * errors["none"]


@pytest.mark.parametrize("streamed", [True, False])
def test_the_sample_with_nan_is_named(streamed, monkeypatch):
    model = tiny_llama()
    if not streamed:
        monkeypatch.setattr(walking.Stream, "open", classmethod(lambda *_: None))
    embedded = model.get_input_embeddings()(token_ids(8, 9)).detach()
    embedded[5, 3, 2] = torch.nan
    given = [{"inputs_embeds": part, "use_cache": False} for part in embedded.split(3)]
    match = r"layers\.0\.mlp\.down_proj: its inputs hold NaN or infinity in calibration sample 5"
    with pytest.raises(DataError, match=match):
        prunekit.prune(model, calibration=given)


class Clamped(nn.Sequential):
    """Modules in turn, and a limit that the first batch does not reach."""

    def forward(self, x):
        return super().forward(x).clamp(-2, 2)


class Layer(nn.Module):
    """An FFN with a residual connection, in one of several ways a layer may be written."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first = how, False
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        kind = Clamped if how == "clamps its block" else nn.Sequential
        self.ffn = kind(self.up, nn.ReLU(), self.down)

    def forward(self, x, *before):
        if self.how == "runs its block twice":
            x = x + self.ffn(x)
        if self.how == "given those to work on":
            return x + before[0] * self.ffn(x)
        if self.how == "leaves something behind":
            self.left["x"] = x if self.first else self.left["x"]
            return x + self.ffn(x + self.left["x"])
        if self.how == "writes to a dict":
            (shared,) = before
            y = self.ffn(x + shared.get("y", 0))
            shared["y"] = y.tanh()
            return x + y
        if self.how == "writes its input":
            x += self.ffn(x)
            return x
        if self.how == "writes its block's output":
            h = self.ffn(x)
            h += x
            return h
        if self.how == "hands on a bias":  # as T5: the first layer makes that of all
            (bias,) = before
            bias = x.new_full((12,), float(self.first)) if bias is None else bias
            return x + self.ffn(x + bias), bias
        return x + self.ffn(x) + sum(0.1 * other for other in before)


class Stack(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.left = how, {}
        self.layers = nn.ModuleList(Layer(how) for _ in range(3))
        for layer in self.layers:
            layer.first, layer.left = layer is self.layers[0], self.left
        if how == "shares weights":
            for layer in self.layers[1:]:
                layer.ffn = self.layers[0].ffn
                layer.up, layer.down = layer.ffn[0], layer.ffn[2]

    def forward(self, x):
        first = before = x
        left = {}
        if self.how == "hands on a bias":
            bias = None
            for layer in self.layers:
                x, bias = layer(x, bias)
            return x
        if self.how == "gone through twice":
            for layer in (*self.layers, *self.layers):
                x = layer(x.tanh() if layer is self.layers[0] else x)
            return x
        for layer in self.layers:
            extra = {
                "given the layer before": (before,),
                "given the first": (first,),
                "given a function": (x.tanh(),),
                "given those to work on": (x > x.mean(),),
                "writes to a dict": (left,),
            }
            x, before = layer(x, *extra.get(self.how, ())), x
        return x


@pytest.mark.parametrize(
    "how",
    [
        "plain",
        "writes its input",
        "writes its block's output",
        "given the layer before",
        "given the first",
        "given a function",
        "given those to work on",
        "clamps its block",
        "runs its block twice",
        "leaves something behind",
        "writes to a dict",
        "hands on a bias",
        "gone through twice",
        "shares weights",
    ],
)
def test_layers_however_they_are_written(how, monkeypatch):
    torch.manual_seed(0)
    dense = Stack(how)
    x = torch.randn(40, 12)
    x[:16] *= 0.5
    given = [{"x": part} for part in x.split(16)]
    results = []
    for streamed in (True, False):
        if not streamed:
            monkeypatch.setattr(walking.Stream, "open", classmethod(lambda *_: None))
        model = copy.deepcopy(dense)
        options = ["policy=uniform", "compensation.target=pruned"]
        results.append(
            prunekit.prune(model, ratio=0.3, calibration=copy.deepcopy(given), overrides=options)
        )
    assert results[0].plan == results[1].plan
    for left, right in zip(
        results[0].model.parameters(), results[1].model.parameters(), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


class Nodes(nn.Module):
    """Layers on the nodes of a graph: a batch [nodes, 12] with its edges has no rows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer("plain") for _ in range(3))

    def forward(self, x, edges):
        x = edges @ x
        for layer in self.layers:
            x = layer(x)
        return x


def test_batches_without_rows_go_through_the_layers_one_by_one_too():
    torch.manual_seed(0)
    model, given = Nodes(), [{"x": torch.randn(n, 12), "edges": torch.eye(n)} for n in (16, 24)]
    groups = [group for group in prunekit.trace(model, given[0]).groups if group.kind == "mlp"]
    x = torch.cat([batch["x"] for batch in given])
    for (_, (site,)), layer in zip(
        walking.Walk(model=model, groups=groups, batches=given), model.layers, strict=True
    ):
        fed = layer.up(x).relu().detach()
        torch.testing.assert_close(site.moments.hessian, fed.T @ fed / len(fed))
        x = layer(x)


def test_what_layers_write_to_a_dict_is_apart_in_the_dense_stream(monkeypatch):
    torch.manual_seed(0)
    dense, given = Stack("writes to a dict"), [{"x": torch.randn(16, 12)} for _ in range(2)]
    found, wanted, run_dense = [], [], LayerPass.run_dense

    def noted(layer):
        after = run_dense(layer)
        found.extend(kept.get(copy=True) for kept in after)
        return after

    monkeypatch.setattr(LayerPass, "run_dense", noted)
    options = ["policy=uniform", "compensation.target=dense"]
    model = copy.deepcopy(dense)
    prunekit.prune(model, ratio=0.3, calibration=copy.deepcopy(given), overrides=options)
    for layer in dense.layers:
        layer.register_forward_hook(lambda _, args, output: wanted.append(output.detach()))
    for batch in given:
        dense(**batch)
    by_layer = [wanted[i] for i in (0, 3, 1, 4, 2, 5)]
    torch.testing.assert_close(found, by_layer[: len(found)])
    assert len(found) >= 4


class Masking(nn.Module):
    """Layers that add their FFN where a mask says so, which the first batch does not have."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer("given those to work on") for _ in range(3))

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x, mask)
        return x


def test_a_block_is_no_summand_where_only_a_later_batch_masks_it():
    torch.manual_seed(0)
    model, x, later = Masking(), torch.randn(16, 12), torch.rand(16, 1) > 0.5
    given = [{"x": x, "mask": torch.ones(16, 1, dtype=torch.bool)}, {"x": x + 1, "mask": later}]
    graph = prunekit.trace(model, given[0])
    groups = [group for group in graph.groups if group.kind == "mlp"]
    targets = {group.name: "residual" for group in groups}
    fed = [[], [], []]
    with ExitStack() as stack, torch.no_grad():
        for layer, own in zip(model.layers, fed, strict=True):
            note = partial(lambda own, _, args: own.append(args[0].double()), own)
            stack.callback(layer.down.register_forward_pre_hook(note).remove)
        for batch in given:
            model(**batch)
    walk = walking.Walk(model=model, groups=groups, batches=given, targets=targets, around=groups)
    for own, (_, (site,)) in zip(map(torch.cat, fed), walk, strict=True):
        found = Moments.together([site.moments, site.held]).hessian
        torch.testing.assert_close(found.double(), own.T @ own / len(own))


@pytest.mark.parametrize("target", ["dense", "residual"])
@pytest.mark.parametrize("family", ["falcon", "opt", "gpt_neox"])
def test_targets_do_not_depend_on_where_activations_wait(family, target):
    found = []
    for budget in ("null", "0"):
        model = build(family, FIRST[family], "sdpa", "eager")
        options = [f"compensation.target={target}", f"memory.budget={budget}", "policy=uniform"]
        found.append(prunekit.prune(model, calibration=token_ids(24, 12), overrides=options))
    assert found[0].plan == found[1].plan
    for left, right in zip(found[0].model.parameters(), found[1].model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("family", ["mixtral", "opt"])
def test_padding_does_not_count_where_positions_are_regrouped(family):
    model = build(family, FIRST[family], "sdpa", "eager")
    graph = trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    groups = [g for g in graph.groups if g.kind == "mlp"]
    ids = token_ids(6, 9)
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    padded = [
        {"input_ids": i, "attention_mask": m, "use_cache": False}
        for i, m in zip(ids.split(3), mask.split(3), strict=True)
    ]
    plain = [
        {"input_ids": row[None, keep.bool()], "use_cache": False}
        for row, keep in zip(ids, mask, strict=True)
    ]
    for (_, left), (_, right) in zip(
        walking.Walk(model=model, groups=groups, batches=padded),
        walking.Walk(model=model, groups=groups, batches=plain),
        strict=True,
    ):
        for one, two in zip(left, right, strict=True):
            assert one.moments.tokens == two.moments.tokens
            torch.testing.assert_close(
                one.moments.hessian, two.moments.hessian, rtol=1e-3, atol=1e-5
            )
        if len(left) == 1:
            assert left[0].moments.tokens == int(mask.sum())


def test_a_sample_without_tokens_is_named_too():
    net = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(100, 10)
    x[77] = torch.nan
    with pytest.raises(DataError, match="calibration sample 77"):
        prunekit.prune(net, calibration=[{"input": part} for part in x.split(50)])


@pytest.mark.parametrize("target", ["pruned", "dense", "residual"])
def test_activations_on_the_device_stay_within_the_budget(target, tmp_path):
    """Counted among all tensors that are alive between two groups, not as the store counts."""
    model = tiny_llama()
    graph = trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    groups = [g for g in graph.groups if g.kind in ("attention", "mlp")]
    rows, length = 3, 11
    given = batches(token_ids(24, length), rows)
    targets = {} if target == "pruned" else {group.name: target for group in groups}
    budget = 10 * rows * length * 48 * 4  # ten of 8 batches of hidden states in each stream
    store, alive = Store(budget=budget, folder=tmp_path / "activations"), []

    def count_bytes():
        gc.collect()
        activations = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
            for one in gc.get_objects()
            if type(one) is torch.Tensor
            and one.is_floating_point()
            and one.device.type == "cpu"
            and one.shape[:2] == (rows, length)
        }
        return sum(activations.values())

    walk = walking.Walk(model=model, groups=groups, batches=given, targets=targets, store=store)
    for _, sites in walk:
        for consumer in sites[0].consumers:
            consumer.store(consumer.weight() * 0.5)
        alive.append(count_bytes())
    assert budget / 2 < max(alive) <= budget
    assert store.peak["device"] <= budget and store.peak["file"] > 0


class Pair(nn.Module):
    """A product, and what is computed of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        y = x @ self.weight.T
        return y, y.mean()


def test_a_module_that_returns_more_than_a_product_is_no_block():
    layer = nn.Sequential(nn.Linear(4, 4), Pair())
    member = Member(parameter="weight", dim=1, role="consumer", index=torch.arange(4)[:, None])
    lone = [Consumer(module=layer[i], member=member, name=str(i)) for i in range(2)]
    finder = Finder(layer, lone, True)
    with finder.looking():
        layer(torch.randn(2, 4))
    assert finder.block_of(lone[:1]) is not None and finder.block_of(lone[1:]) is None


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_blocks_whose_inputs_have_no_room_near_run_again_or_are_folded_in(family, monkeypatch):
    """As where a GPU's budget is spent; attention beside an FFN is not folded."""

    def prune():
        model, folded = build(family, FIRST[family], "sdpa", "eager").double(), []
        fold = LayerPass.fold

        def noted(layer, block):
            fold(layer, block)
            folded.append(block is not None and block.folded)

        with monkeypatch.context() as here:
            here.setattr(LayerPass, "fold", noted)
            options = ["compensation.target=pruned", "policy=uniform"]
            options.append("data.calibration.batch_size=3")
            result = prunekit.prune(model, ratio=0.3, calibration=token_ids(12), overrides=options)
        return model.state_dict(), result.plan, folded

    near, plan, kept = prune()
    room = iter([True] * 2 + [False] * 1000)
    monkeypatch.setattr(Store, "is_near", lambda *_: next(room))
    again, other, folded = prune()
    assert plan == other
    assert not any(kept)
    assert set(folded) == {family == "llama"}
    for name, tensor in near.items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-9, atol=1e-9)
