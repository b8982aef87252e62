"""What can't be cut is found before any work: groups, numbers of units, classes that refuse."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import example, randomise, tiny_llama, token_ids
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import prunekit
from prunekit.errors import CheckpointError, ConfigError, SurgeryError
from prunekit.graph import trace
from prunekit.graph.example import trace_batch
from prunekit.plan import PruningPlan
from prunekit.report.pruning import gather_left_out, tell_left_out
from prunekit.surgery import apply_plan, rehearsal
from prunekit.surgery.counting import count_units
from prunekit.surgery.cut import cut_model
from prunekit.surgery.masking import run_example
from prunekit.surgery.rehearsal import rehearse

SIZES = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 6, "mamba_n_groups": 1, "mamba_d_state": 8}
FALCON_H1 = {"num_key_value_heads": 4, "head_dim": 6, "num_hidden_layers": 2, "mamba_d_ssm": 48}


class Layer(nn.Module):
    """An FFN between two linear modules; `how` is what goes on between them."""

    def __init__(self, how, width=24):
        super().__init__()
        self.up, self.down, self.how = nn.Linear(12, width), nn.Linear(width, 12), how

    def forward(self, x):
        return x + self.down(self.how(self, self.up(x).relu()))


class Layers(nn.Module):
    def __init__(self, *hows):
        super().__init__()
        self.layers, self.head = nn.ModuleList(map(Layer, hows)), nn.Linear(12, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def free(layer, x):
    return x


def fixed(layer, x):
    """The width stands in the code: no attribute can follow."""
    return x.reshape(len(x), 24)


def scaled(layer, x):
    """The width is read off a tensor and computed with: nothing masked has the smaller one."""
    return x * x.shape[-1] ** -0.5


def sliced(layer, x):
    """The bounds stand in the code: units that lie behind those removed move over them."""
    return torch.cat([x[:, :4], x[:, 4:12] * 2, x[:, 12:]], -1)


def summed(layer, x):
    """As `sliced`, of units that are summed without a weight, so that no mask equals a cut."""
    return x * x[:, 4:12].sum(-1, keepdim=True)


class Other(nn.Module):
    """An FFN whose matrices have other names."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        return x + self.narrow(self.wide(x).relu())


def rehearsed(model, graph=None, kinds=("attention", "query_head", "mlp"), **options):
    graph = graph or trace(model, (torch.randn(4, 12),))
    groups = [group for group in graph.groups if group.prunable and group.kind in kinds]
    assert groups
    return rehearse(model, graph, groups, **options)


@pytest.fixture
def cuts(monkeypatch):
    """The names of the groups of every cut that is rehearsed."""
    seen, own = [], rehearsal._Stage.find_fault

    def spy(self, removed):
        seen.append(list(removed))
        return own(self, removed)

    monkeypatch.setattr(rehearsal._Stage, "find_fault", spy)
    return seen


def test_a_model_that_can_be_cut_is_rehearsed_once(cuts):
    model = tiny_llama(layers=3)
    before = copy.deepcopy(model.state_dict()), repr(model), model.config.to_json_string()
    graph = trace(model, example())
    assert rehearsed(model, graph, saved=True) is graph
    assert len(cuts) == 1 and len(cuts[0]) >= 6
    assert (repr(model), model.config.to_json_string()) == before[1:]
    assert all(torch.equal(t, before[0][name]) for name, t in model.state_dict().items())


def test_what_a_module_can_not_run_without_stays_whole(cuts):
    model = Layers(free, fixed, free, fixed)
    graph = rehearsed(model)
    verdicts = {group.name: group.prunable for group in graph.groups if group.kind == "mlp"}
    assert verdicts == {f"layers.{i}": i % 2 == 0 for i in range(4)}
    assert graph["layers.1"].reason.startswith("the cut model doesn't run: shape '[4, 24]'")
    apply_plan(model, graph, PruningPlan({"layers.0": [3], "layers.2": [0, 1]}))


def test_layers_that_are_alike_share_a_verdict_and_others_do_not(cuts):
    """The third layer has a number of its own, by which it can be cut."""
    model = Layers(fixed, fixed, lambda layer, x: x.unflatten(-1, (layer.n, -1)).flatten(-2))
    model.layers[2].n = 24
    model.layers[1].note = 1
    graph = rehearsed(model)
    alone = [names[0] for names in cuts if len(names) == 1]
    assert alone == ["layers.0", "layers.1", "layers.2", "layers.2"]  # the last one is what is left
    assert [graph[f"layers.{i}"].prunable for i in range(3)] == [False, False, True]
    del model.layers[1].note
    cuts.clear()
    rehearsed(model)
    assert ["layers.1"] not in cuts


class InStep(Layers):
    """Each layer has a gate in another list, and runs with the one in the same place."""

    def __init__(self):
        super().__init__(free, free, free, free)
        self.gates = nn.ModuleList(nn.Linear(12, 12) for _ in self.layers)

    def forward(self, x):
        for layer, gate in zip(self.layers, self.gates, strict=False):
            x = x + layer(gate(x))
        return self.head(x)


def test_lists_that_run_in_step_are_tried_one_by_one():
    model = InStep().eval()
    graph = trace(model, {"x": torch.randn(2, 3, 12)})
    assert {stack.name for stack in graph.stacks if stack.prunable} == {"layers", "gates"}
    after = rehearse(model, graph, graph.stacks, saved=False)
    assert not any(stack.prunable for stack in after.stacks)


class Heads(nn.Module):
    """Attention that takes its heads by twos only."""

    def __init__(self):
        super().__init__()
        self.n, self.parts = 8, [nn.Linear(12, 32) for _ in range(3)]
        self.q, self.k, self.v = self.parts
        self.out, self.head = nn.Linear(32, 12), nn.Linear(12, 5)

    def forward(self, x):
        if self.n % 2:
            raise ValueError("heads come by twos")
        parts = (part(x).unflatten(-1, (self.n, 4)).transpose(1, 2) for part in self.parts)
        mixed = nn.functional.scaled_dot_product_attention(*parts, scale=0.5)
        return self.head(x + self.out(mixed.transpose(1, 2).flatten(2)))


def heads_by_twos():
    model = Heads()
    return model, trace(model, (torch.randn(2, 3, 12),))


def test_the_numbers_in_which_units_can_go_are_found():
    model, graph = heads_by_twos()
    graph = rehearsed(model, graph)
    assert graph["attention"].prunable and graph["attention"].multiple == 2
    calibration = [{"x": torch.randn(2, 3, 12)}]
    result = prunekit.prune(model, method="magnitude", ratio=0.15, calibration=calibration)
    assert model.n == 6 and result.report.left_out is None


@pytest.mark.parametrize(
    ("how", "left"), [(scaled, []), (sliced, ["layers.1.mlp.2"]), (summed, ["layers.1.mlp.2"])]
)
def test_numbers_in_the_code_that_do_not_follow_are_found_before_any_work(how, left):
    """Units before the end of the slice have to stay, those behind it may go."""
    torch.manual_seed(0)
    model = Layers(free, how, how)
    before = copy.deepcopy(model.state_dict())
    graph = rehearsed(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    groups = [g for g in graph.groups if g.kind == "mlp" and g.layer]
    assert [g.name for g in groups if g.prunable and g.layer == 1] == left
    assert all(g.reason for g in groups if not g.prunable)
    removed = {g.name: [0, 2] for g in graph.groups if g.kind == "mlp" and g.prunable}
    apply_plan(model, graph, PruningPlan(removed))


def test_positions_are_counted_too():
    """The slice takes as many units as before, and one of another group in place of its own.

    The masked model tells nothing here: its units are dead.
    """
    model = Layers(free, sliced)
    nn.init.constant_(model.layers[1].up.bias, -100)
    graph = trace(model, (torch.randn(4, 12),))
    removed = {"layers.1.mlp.0": [1], "layers.1.mlp.2": list(range(8))}
    cut_model(model, graph, removed)
    text = count_units(model, graph, removed).text
    assert text == "the cut model reads other units of layers.1.up.weight than were left"


class Dropping(nn.Module):
    """Drops attention out in evaluation mode, too, told so by the fifth argument."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x, p=0.5):
        return F.scaled_dot_product_attention(self.q(x), x, x, None, p)


def test_attention_drops_nothing_out_while_models_are_compared():
    model, x = Dropping(), torch.randn(2, 5, 8)
    graph = trace(model, {"x": x})
    (output,) = run_example(model, graph)
    torch.testing.assert_close(output, model(x, 0.0))


def test_a_class_that_refuses_the_sizes_counts_in_memory_where_it_takes_the_uncut_model():
    """MPNet's config wants the number of heads to divide the hidden size."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    config = AutoConfig.for_model("mpnet", num_attention_heads=4, **sizes)
    model = AutoModel.from_config(config)
    graph = rehearsed(model, trace(model, {"input_ids": token_ids(2, 8)}))
    assert graph["encoder"].prunable and graph["encoder"].multiple == 2


def test_what_meta_can_not_run_is_traced_instead(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(rehearsal, "_run", refuse)
    graph = rehearsed(Layers(free, fixed))
    assert [graph[f"layers.{i}"].prunable for i in range(2)] == [True, False]


def looks(layer, x):
    """It works on the positions that its numbers choose: meta has none."""
    rows = torch.nonzero(x.flatten(0, -2).sum(-1) > 0)[:, 0]
    return x.flatten(0, -2).index_add(0, rows, x.flatten(0, -2)[rows]).view_as(x)


def test_what_looks_at_numbers_is_rehearsed_in_the_dense_form(monkeypatch):
    """It is traced once, and never to try a cut."""
    monkeypatch.setattr(rehearsal, "count_units", None)
    graph = rehearsed(Layers(looks, fixed))
    assert [graph[f"layers.{i}"].prunable for i in range(2)] == [True, False]


def test_groups_that_can_not_be_cut_together(monkeypatch):
    """Each of them leaves enough, both do not."""

    def enough(model, inputs, output):
        if sum(layer.up.out_features for layer in model.layers) < 47:
            raise ValueError("too few")

    model = Layers(free, free)
    graph = trace(model, (torch.randn(4, 12),))
    monkeypatch.setattr(Layers, "enough", enough, raising=False)
    own = rehearsal._run

    def run(copy, graph):
        enough(copy, None, None)
        return own(copy, graph)

    monkeypatch.setattr(rehearsal, "_run", run)
    with pytest.raises(SurgeryError, match=r"not all together: .* too few; expected .* scope.excl"):
        rehearsed(model, graph)


def test_what_is_in_the_way_of_the_others_stays_whole():
    """CodeGen's projection holds four parts, which its code counts, with as many heads in each."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_positions": 32, "n_embd": 64, "n_head": 16, "rotary_dim": 4}
    config = AutoConfig.for_model(
        "codegen", n_layer=2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, **sizes
    )
    model = randomise(AutoModelForCausalLM.from_config(config))
    result = prunekit.prune(
        model,
        ratio=0.2,
        method="magnitude",
        calibration=token_ids(4, 12),
        overrides=["shapes=free"],
    )
    kinds = {result.graph[name].kind for name, units in result.plan.removed.items() if units}
    assert kinds == {"attention", "mlp"}
    assert [(row["groups"], row["count"]) for row in result.report["left_out"]] == [
        ("h.*.attn.attention.0", 2)
    ]


def test_what_a_cache_can_not_follow_stays_whole():
    """RWKV's states lie in one tensor, as wide as the config says."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "context_length": 32, "hidden_size": 32, "num_hidden_layers": 2}
    model = randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **sizes)))
    ids, mixers = token_ids(4, 12), ["blocks.0.attention", "blocks.1.attention"]
    graph = trace(model.eval(), {"input_ids": ids[:2, :8], "use_cache": False})
    groups = [group for group in graph.groups if group.kind == "mlp"]
    after = rehearse(model, graph, groups)
    assert [group.name for group in groups if not after[group.name].prunable] == mixers
    assert "can't run with its cache then" in after[mixers[0]].reason
    removed = {group.name: [0, 5] for group in groups if group.name not in mixers}
    apply_plan(model, after, PruningPlan(removed))
    with torch.no_grad():
        cached, plain = (model(ids, use_cache=use).logits for use in (True, False))
    torch.testing.assert_close(cached, plain)


def test_defaults_cut_what_can_be_cut_and_tell_what_can_not():
    torch.manual_seed(0)
    result = prunekit.prune(
        Layers(fixed, free, fixed),
        ratio=0.1,
        method="magnitude",
        calibration=[{"x": torch.randn(4, 12)}],
        overrides=["policy=uniform"],
    )
    assert result.report["ratio"]["achieved"] == pytest.approx(0.1, abs=0.02)
    rows = result.report["left_out"]
    assert [(row["groups"], row["count"]) for row in rows] == [("layers.0", 1), ("layers.2", 1)]
    assert all("shape '[2, 24]' is invalid" in row["reason"] for row in rows)
    lines = tell_left_out(result.report.left_out)
    assert 'scope.exclude=["layers.0","layers.2"]' in lines[-1]


def test_patterns_name_the_groups_that_are_left_out_and_no_others():
    """Whether the printed patterns are excluded or not, the same groups are cut."""

    def cut(middle, overrides=()):
        torch.manual_seed(0)
        model, batch = Layers(fixed, free, fixed), {"x": torch.randn(4, 12)}
        model.layers[1] = middle(free) if middle is Layer else middle()
        given = ["policy=uniform", *overrides]
        result = prunekit.prune(
            model, ratio=0.1, method="magnitude", calibration=[batch], overrides=given
        )
        return result.plan.removed, result.report.left_out

    for middle, expected in (
        (Layer, ["layers.0", "layers.2"]),
        (Other, ["layers.*.down.weight"]),
    ):
        removed, left_out = cut(middle)
        assert [entry.groups for entry in left_out] == expected
        patterns = ",".join(f'"{entry.groups}"' for entry in left_out)
        assert cut(middle, [f"scope.exclude=[{patterns}]"]) == (removed, None)


def test_alike_groups_are_one_line_though_each_reason_names_its_layer():
    graph = prunekit.trace(tiny_llama(), example())
    left = [
        dataclasses.replace(group, prunable=False, exact=False, reason=f"{group.module} is odd")
        for group in graph.groups
        if group.kind == "mlp"
    ]
    (entry,) = gather_left_out(left)
    assert (entry.count, entry.reason) == (len(left), "model.layers.*.mlp is odd")


def test_a_hybrid_model_is_cut_whole():
    torch.manual_seed(0)
    config = AutoConfig.for_model("falcon_h1", **SIZES, **MAMBA, **FALCON_H1)
    model = AutoModelForCausalLM.from_config(config).eval()
    result = prunekit.prune(
        model,
        ratio=0.1,
        method="magnitude",
        calibration=token_ids(4, 8),
        overrides=["policy=uniform"],
    )
    assert result.report.left_out is None


def test_width_of_heads_is_cut_in_step():
    model = tiny_llama()
    graph = trace(model, example())
    assert rehearsed(model, graph, kinds=("head_dim", "channel", "mlp")) is graph


def test_nothing_left_is_an_error_with_the_reason():
    batch = {"x": torch.randn(4, 12)}
    with pytest.raises(
        ConfigError, match=r"no prunable group .* \(layers.0: the cut model doesn't"
    ):
        prunekit.prune(Layers(fixed, fixed), method="magnitude", calibration=[batch])


class Parts(nn.Module):
    """No FFN, and parts whose sizes stand in a list that does not follow a cut."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.sizes = nn.Linear(8, 96), nn.Linear(32, 8), [32, 32, 32]

    def forward(self, x):
        one, two, three = self.first(x).split(self.sizes, -1)
        return self.second(one * two.sigmoid() + three)


def test_the_reason_of_a_network_without_blocks_is_told_too():
    batch = {"x": torch.randn(4, 8)}
    with pytest.raises(ConfigError, match=r"groups=block: .* \(channel: the cut model doesn't run"):
        prunekit.prune(Parts(), method="magnitude", calibration=[batch])


class Chance(nn.Module):
    """Draws random numbers in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(F.dropout(self.up(x + torch.rand(8)).relu()))


def test_random_numbers_are_no_difference_and_the_generator_stays():
    model, batch = Chance(), {"x": torch.randn(4, 8)}
    graph, state = trace(model, batch), torch.get_rng_state()
    torch.testing.assert_close(run_example(model, graph), run_example(model, graph))
    assert torch.equal(torch.get_rng_state(), state)
    how = {"ratio": 0.3, "method": "magnitude", "policy": "uniform"}
    assert prunekit.prune(model, calibration=[batch], **how).plan.removed


def test_a_class_that_refuses_the_sizes_counts_where_the_model_is_saved(monkeypatch):
    """The class holds no FFN of another width."""
    model = tiny_llama()
    graph = trace(model, example())

    def refuse(cut):
        if cut.model.layers[0].mlp.up_proj.out_features != model.config.intermediate_size:
            raise CheckpointError(
                "its class refuses its sizes: a model cut like this can't be saved"
            )

    monkeypatch.setattr(rehearsal, "required_record", refuse)
    graph = rehearsed(model, graph)
    verdicts = {(group.kind, group.prunable) for group in graph.groups if group.layer == 0}
    assert {("mlp", False), ("attention", True)} <= verdicts
    assert "can't be saved" in graph["layers.0.mlp"].reason


class Odd(nn.Module):
    """A width under a name of its own, beside experts, of which nothing tells a wrong guess."""

    def __init__(self):
        super().__init__()
        self.span = 24
        self.up, self.down, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 5)
        self.wide, self.norm, self.narrow = nn.Linear(12, 20), nn.LayerNorm(20), nn.Linear(20, 12)

    def forward(self, x):
        x = x + self.down(self.up(x).relu().reshape(-1, self.span))
        return self.head(x + self.narrow(self.norm(self.wide(x)).relu()))


def test_guesses_that_exact_groups_need_are_made_beside_inexact_ones():
    model = Odd()
    graph = trace(model, (torch.randn(4, 12),))
    exact, inexact = (next(g for g in graph.groups if g.num_units == n) for n in (24, 20))
    assert exact.exact and inexact.prunable and not inexact.exact
    assert rehearsed(model, graph, kinds=(exact.kind, inexact.kind)) is graph
    apply_plan(model, graph, PruningPlan({exact.name: [0, 1], inexact.name: [3]}))
    assert model.span == 22 and model(torch.randn(4, 12)).shape == (4, 5)


class ByLength(nn.Module):
    """Its width is a number in what it does with more than sixteen tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 12), nn.Linear(12, 20)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        h = self.up(x).relu()
        if input_ids.shape[1] > 16:
            h = h / h.shape[-1]
        return self.head(x + self.down(h))


@pytest.mark.parametrize(("length", "memory"), [(8, True), (9, True), (17, True), (17, False)])
def test_the_way_of_longer_samples_is_compared_where_memory_lets_it(monkeypatch, length, memory):
    """Samples of the batch, and twice as long ones."""

    def run_out(*_):
        raise torch.OutOfMemoryError

    if not memory:
        monkeypatch.setattr("prunekit.surgery.trial.run_inputs", run_out)
    model, batch = ByLength(), {"input_ids": token_ids(2, length, vocabulary=20)}
    graph = trace_batch(model, batch)
    after = rehearse(model, graph, [graph["mlp"]], batch=batch)
    assert after["mlp"].prunable == (length == 8 or not memory)
    assert after is graph or "the input of down differs" in after["mlp"].reason
