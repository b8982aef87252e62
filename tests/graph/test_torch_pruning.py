"""Beside torch-pruning: it prunes by our groups, finds the same ones where it is right, and is
pinned where it isn't.

The pins describe torch-pruning 1.6.1. One that fails with a later version is good news: move it to
the parity tests.
"""

import copy

import pytest
import torch
import torch_pruning
from conftest import example, tiny_llama, zero_consumers
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, gelu, scaled_dot_product_attention
from torch_pruning.dependency import Group
from torch_pruning.pruner.importance import GroupMagnitudeImportance
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.errors import TraceError
from prunekit.graph import trace
from prunekit.graph.interop import to_torch_pruning

HEADS, WIDTH = 4, 24


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.norm3 = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12)
        self.shortcut, self.head = nn.Conv2d(8, 12, 1, stride=2), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()
        x = (self.shortcut(x) + self.norm3(self.conv3(x))).relu()
        return self.head(x.mean((2, 3)))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm1, self.conv1 = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 3, padding=1),
        )
        self.norm2, self.conv2 = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 3, padding=1)
        self.norm3, self.head = nn.BatchNorm2d(18), nn.Linear(18, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.conv1(self.norm1(x).relu())], 1)
        x = torch.cat([x, self.conv2(self.norm2(x).relu())], 1)
        return self.head(adaptive_avg_pool2d(self.norm3(x).relu(), 1).flatten(1))


class Separate(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return (
            layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )


class Fused(nn.Module):
    """One Linear for q, k and v, taken apart as most ViTs do it (`unbind`) or with `chunk`."""

    def __init__(self, apart):
        super().__init__()
        self.qkv, self.apart = nn.Linear(WIDTH, 3 * WIDTH), apart

    def forward(self, x):
        if self.apart == "unbind":
            return (
                self.qkv(x).unflatten(-1, (3, -1, WIDTH // HEADS)).permute(2, 0, 3, 1, 4).unbind(0)
            )
        return (
            t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )


class Block(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.norm1, self.heads, self.proj = nn.LayerNorm(WIDTH), heads, nn.Linear(WIDTH, WIDTH)
        self.norm2, self.fc1, self.fc2 = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 40),
            nn.Linear(40, WIDTH),
        )

    def forward(self, x):
        q, k, v = self.heads(self.norm1(x))
        x = x + self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, WIDTH, 4, stride=4), Block(heads)
        self.token, self.position = (
            nn.Parameter(torch.randn(1, 1, WIDTH)),
            nn.Parameter(torch.randn(1, 5, WIDTH)),
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.block(x))[:, 0])


SMALL = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
SMALL |= {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
}
CAUSAL = {
    "phi3": SMALL,
    "gpt_neox": SMALL,
    "gpt2": SMALL | {"n_inner": 40},
    "mixtral": SMALL | {"num_local_experts": 4},
}
PLAIN = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.GELU(), nn.Linear(12, 3)
    ),
    "resnet": ResNet,
    "densenet": DenseNet,
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 2), nn.ConvTranspose2d(8, 6, 2), nn.Conv2d(6, 2, 1)
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1)
    ),
    "prelu": lambda: nn.Sequential(nn.Conv2d(3, 8, 2), nn.PReLU(8), nn.Conv2d(8, 2, 1)),
    "flatten": lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(12 * 36, 2)
    ),
    "vit": lambda: ViT(Separate()),
    "vit_fused": lambda: ViT(Fused("unbind")),
}


def build(name, attention="sdpa", **config):
    """A model with random weights everywhere (statistics of norms too), and its inputs."""
    torch.manual_seed(0)
    if name in PLAIN or name == "vit_chunk":
        model = PLAIN[name]() if name in PLAIN else ViT(Fused("chunk"))
        inputs = (torch.randn(4, 6),) if name == "mlp" else (torch.randn(2, 3, 8, 8),)
    elif name == "llama":
        return tiny_llama(attention=attention, layers=1, **config), example()
    else:
        config = AutoConfig.for_model(name, **CAUSAL[name] | config)
        model, inputs = (
            AutoModelForCausalLM.from_config(config, attn_implementation=attention),
            example(),
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
        for statistics in (
            module for module in model.modules() if isinstance(module, nn.BatchNorm2d)
        ):
            statistics.running_mean.normal_()
            statistics.running_var.uniform_(0.5, 2)
    return model.eval(), inputs


@torch.no_grad()
def outputs(model, inputs):
    result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return getattr(result, "logits", result)


def dependencies(model, inputs):
    """torch-pruning's own tracer."""
    graph = torch_pruning.DependencyGraph()
    return graph.build_dependency(
        model, inputs, verbose=False, output_transform=lambda o: getattr(o, "logits", o)
    )


def cuts(group, model):
    """What a torch-pruning group removes: {(tensor or module, output or input side, positions)}."""
    names = {
        **{p: n for n, p in model.named_parameters()},
        **{m: n for n, m in model.named_modules()},
    }
    found = set()
    for dependency, positions in group.items:
        target, pruner = dependency.target.module, dependency.handler.__self__
        name = names.get(target, "")
        if hasattr(pruner, "attribute"):
            name = f"{name}.{pruner.attribute}".lstrip(".")
        if isinstance(target, nn.Parameter) or (name and list(target.parameters(recurse=False))):
            found.add((name, dependency.handler.__name__, tuple(sorted(positions))))
    return found


def cuttable(graph):
    return [
        group
        for group in graph.groups
        if group.prunable and group.kind not in ("head_dim", "query_head")
    ]


def roots(group, model):
    """(module, positions of each unit) of the group's Linear and convolution outputs."""
    for member in group.members:
        module = model.get_submodule(member.parameter.rpartition(".")[0])
        side = int(isinstance(module, nn.ConvTranspose2d))
        if isinstance(
            module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d
        ) and member.parameter.endswith("weight"):
            yield from [(module, member.index.tolist())] if member.dim == side else []


def error_after(group, model, inputs, graph, name, units):
    """By how much of their size the outputs differ from the masked model's, once torch-pruning has
    pruned.
    """
    masked = copy.deepcopy(model)
    zero_consumers(masked, graph, {name: units})
    expected = outputs(masked, inputs)
    group.prune()
    return ((outputs(model, inputs) - expected).abs().max() / expected.abs().max()).item()


# torch-pruning prunes by our groups


@pytest.mark.parametrize("name", [*PLAIN, "llama", "phi3"])
def test_torch_pruning_cuts_what_surgery_cuts(name):
    model, inputs = build(name)
    graph = trace(model, inputs)
    for group in cuttable(graph):
        if name == "phi3" and group.kind == "attention":
            continue  # reads its head counts from the config
        units = [0, group.num_units - 1]
        cut, ours = copy.deepcopy(model), copy.deepcopy(model)
        group.to_torch_pruning(cut, units).prune()
        prunekit.apply_plan(ours, graph, prunekit.PruningPlan({group.name: units}))
        expected = ours.state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in cut.state_dict().items())
        torch.testing.assert_close(outputs(cut, inputs), outputs(ours, inputs))
        if group.exact:
            masked = copy.deepcopy(model)
            zero_consumers(masked, graph, {group.name: units})
            torch.testing.assert_close(
                outputs(cut, inputs), outputs(masked, inputs), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize(("name", "units"), [("gpt2", [0, 39]), ("mixtral", [1, 3, 5, 6])])
def test_what_torch_pruning_has_no_pruner_for(name, units):
    model, inputs = build(name)
    graph = trace(model, inputs)
    group = next(group for group in graph.groups if group.kind == "mlp")
    assert (
        error_after(to_torch_pruning(group, model, units), model, inputs, graph, group.name, units)
        < 1e-5
    )


def test_a_unit_goes_whole_from_whichever_member():
    model, inputs = build("llama")
    group = trace(model, inputs)["layers.0.self_attn"]
    whole = cuts(to_torch_pruning(group, model, [1]), model)
    assert ("model.layers.0.self_attn.k_proj", "prune_out_channels", tuple(range(6, 12))) in whole
    assert ("model.layers.0.self_attn.o_proj", "prune_in_channels", tuple(range(12, 24))) in whole
    everything = to_torch_pruning(group, model)
    for dependency, _ in everything.items:
        position = next(
            p for name, _, p in whole if model.get_submodule(name) is dependency.target.module
        )[-1]
        part = everything._DG.get_pruning_group(
            dependency.target.module, dependency.handler, [position]
        )
        assert cuts(part, model) == whole
    everything.prune([13])
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == 36
    assert (attention.k_proj.out_features, attention.o_proj.in_features) == (18, 36)


def test_tied_weights_are_cut_in_both_places():
    model, inputs = build("llama", tied=True)
    group = next(group for group in trace(model, inputs).groups if group.kind == "channel")
    to_torch_pruning(group, model, [5]).prune()
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert outputs(model, inputs).shape == (2, 7, 97)


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_importances_score_our_groups_as_torch_prunings_own(name):
    model, inputs = build(name)
    theirs, score = (
        dependencies(model, inputs),
        GroupMagnitudeImportance(normalizer=None, group_reduction="sum"),
    )
    for group in cuttable(trace(model, inputs)):
        own = to_torch_pruning(group, model)
        root, positions = own[0].dep, own[0].idxs
        other = theirs.get_pruning_group(root.target.module, root.handler, positions)
        torch.testing.assert_close(score(own), score(other))


UNCONVERTIBLE = {
    r"1.weight\[0\]: .* no pruner for this part of RMSNorm": lambda: [
        nn.Linear(3, 8),
        nn.RMSNorm(8),
        nn.Linear(8, 2),
    ],
    r"1.weight\[.\]: .* no pruner for this part of Squared": lambda: [
        nn.Linear(3, 8),
        Squared(),
        nn.Linear(5, 2),
    ],
    r"1.weight\[.\]: .* no pruner for this part of Conv2d": lambda: [
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 12, 1, groups=4),
        nn.Conv2d(12, 2, 1),
    ],
    "1.weight: .* no pruner for whole groups of a GroupNorm": lambda: [
        nn.Conv2d(3, 8, 1),
        nn.GroupNorm(4, 8),
        nn.Conv2d(8, 2, 1),
    ],
}


class Squared(nn.Bilinear):
    def __init__(self):
        super().__init__(8, 8, 5)

    def forward(self, x):
        return super().forward(x, x)


@pytest.mark.parametrize("message", UNCONVERTIBLE)
def test_what_cannot_be_converted_says_so(message):
    model = nn.Sequential(*UNCONVERTIBLE[message]())
    x = torch.randn(4, 3, 6, 6) if isinstance(model[0], nn.Conv2d) else torch.randn(4, 3)
    group = next(group for group in trace(model, (x,)).groups if group.prunable)
    with pytest.raises(TraceError, match=message):
        to_torch_pruning(group, model)


def test_what_does_not_fit_says_so():
    model, inputs = build("mlp")
    graph = trace(model, inputs)
    group = next(group for group in graph.groups if group.num_units == 20)
    with pytest.raises(
        TraceError, match=rf"{group.name}: units must be some of 0 to 19, got \[20\]"
    ):
        to_torch_pruning(group, model, [20])
    with pytest.raises(TraceError, match=rf"{group.name}: the model has no tensor called 0.weight"):
        to_torch_pruning(group, nn.Linear(6, 20))
    fixed = next(group for group in graph.groups if not group.prunable)
    with pytest.raises(TraceError, match="can't be pruned: it is an axis of the model's"):
        to_torch_pruning(fixed, model)


# Where torch-pruning is right, it finds the same groups


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {}) for name in PLAIN),
        ("llama", {"kv_heads": 8}),
        ("phi3", {"num_key_value_heads": 8}),
    ],
    ids=[*PLAIN, "llama 8:8", "phi3 8:8"],
)
def test_same_groups_as_torch_pruning(name, config):
    model, inputs = build(name, **config)
    graph, theirs = trace(model, inputs), dependencies(model, inputs)
    compared = 0
    for group in cuttable(graph):
        for unit in (0, group.num_units // 2, group.num_units - 1):
            ours = cuts(to_torch_pruning(group, model, [unit]), model)
            for module, positions in roots(group, model):
                prune = theirs.get_pruner_of_module(module).prune_out_channels
                assert cuts(theirs.get_pruning_group(module, prune, positions[unit]), model) == ours
                compared += 1
    assert compared >= 3


# Where torch-pruning 1.6.1 is wrong; ours is held right on the same models by test_trace.py and
# test_zoo.py


class EndlessError(Exception):
    pass


@pytest.fixture
def no_endless_group(monkeypatch):
    """Stop torch-pruning's search for a group at a thousand entries; a layer of these models makes
    less than 100.
    """
    add = Group.add_dep

    def bounded(self, dep, idxs):
        if len(self) > 1000:
            raise EndlessError(max(index.idx for index in idxs))
        add(self, dep, idxs)

    monkeypatch.setattr(Group, "add_dep", bounded)


@pytest.mark.usefixtures("no_endless_group")
@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pinned_two_queries_a_key_never_end(attention, projection):
    """The channel grows in circles through rotary's slices and cats: past a layer of 24 outputs,
    past any bound.
    """
    model, inputs = build("llama", attention, kv_heads=4)
    root = model.model.layers[0].self_attn.get_submodule(projection)
    with pytest.raises(EndlessError) as caught:
        dependencies(model, inputs).get_pruning_group(
            root, torch_pruning.prune_linear_out_channels, list(range(6))
        )
    assert caught.value.args[0] > 500


@pytest.mark.parametrize(("projection", "heads"), [("q_proj", 4), ("k_proj", 1)])
def test_pinned_four_queries_a_key_are_silently_wrong(projection, heads):
    """As many positions of k_proj as of q_proj go, whichever is named; the outputs are others,
    without an error.
    """
    model, inputs = build("llama", kv_heads=2)
    graph = trace(model, inputs)
    root = model.model.layers[0].self_attn.get_submodule(projection)
    positions = list(range(6 * heads))
    group = dependencies(model, inputs).get_pruning_group(
        root, torch_pruning.prune_linear_out_channels, positions
    )
    ours = cuts(to_torch_pruning(graph["layers.0.self_attn"], model, [0]), model)
    assert {len(p) for _, _, p in ours} == {24, 6}
    assert {len(p) for _, _, p in cuts(group, model)} == {6 * heads}
    assert error_after(group, model, inputs, graph, "layers.0.self_attn", [0]) > 0.1


def test_pinned_conv1d_is_not_seen():
    model, inputs = build("gpt2")
    layer = model.transformer.h[0].mlp.c_fc
    with pytest.raises(ValueError, match="not in the dependency graph"):
        dependencies(model, inputs).get_pruning_group(
            layer, torch_pruning.prune_linear_out_channels, [0]
        )


def test_pinned_fused_experts_are_not_seen():
    """As loose parameters only, and there by the last dim: never an expert's inner channels of both
    its weights.
    """
    model, inputs = build("mixtral")
    experts, theirs = model.model.layers[0].mlp.experts, dependencies(model, inputs)
    with pytest.raises(ValueError, match="not in the dependency graph"):
        theirs.get_pruning_group(experts, torch_pruning.prune_linear_out_channels, [0])
    assert theirs.module2node[experts.gate_up_proj].pruning_dim == 2
    group = theirs.get_pruning_group(
        experts.gate_up_proj, torch_pruning.prune_parameter_out_channels, [0]
    )
    assert "lm_head" in {name for name, _, _ in cuts(group, model)}


@pytest.mark.parametrize(
    ("name", "config", "layer", "head", "theirs"),
    [
        ("gpt_neox", {}, "gpt_neox.layers.0.attention.dense", range(6), "negative positions"),
        (
            "phi3",
            {"num_key_value_heads": 4},
            "model.layers.0.self_attn.o_proj",
            range(12),
            "two key heads, not one",
        ),
        ("vit_chunk", {}, "block.proj", range(6), "rows of q alone"),
    ],
    ids=["interleaved", "grouped", "chunked"],
)
def test_pinned_fused_attention_is_wrong(name, config, layer, head, theirs):
    """From the layer that reads the heads; the loose position embedding is what keeps it from
    following `chunk`.
    """
    model, inputs = build(name, **config)
    group = next(group for group in trace(model, inputs).groups if group.kind == "attention")
    ours = {n: p for n, _, p in cuts(to_torch_pruning(group, model, [0]), model)}
    assert ours.pop(layer) == tuple(head)
    prune = torch_pruning.prune_linear_in_channels
    found = dependencies(model, inputs).get_pruning_group(
        model.get_submodule(layer), prune, list(head)
    )
    others = {n: p for n, _, p in cuts(found, model) if n in ours}
    (fused,) = ours.values()
    (wrong,) = others.values()
    if theirs == "negative positions":
        assert min(wrong) < 0
    elif theirs == "two key heads, not one":
        assert wrong[: len(head)] == fused[: len(head)]
        assert len(wrong) == 36 > len(fused) == 24
    else:
        assert wrong == tuple(head)
        assert len(fused) == 18
