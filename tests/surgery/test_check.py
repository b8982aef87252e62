"""Surgery's check: rounding never fails it, a wrong slice does, and nothing of it stays behind."""

import copy
import weakref

import pytest
import torch
from conftest import example, randomise, tiny_llama, token_ids
from families import build, values_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import prunekit
from prunekit.errors import SurgeryError
from prunekit.surgery import check, counting, cut
from prunekit.surgery.masking import masked
from prunekit.surgery.probes import Mismatch, Probe, Recording


class SumsInHalves(TorchDispatchMode):
    """Adds matrix products up in two halves, as kernels of a GPU may: where columns are gone, other
    columns meet in a half, and the sum is rounded otherwise.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            left, right = args
            half = left.shape[1] // 2
            return left[:, :half] @ right[:half] + left[:, half:] @ right[half:]
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def rough():
    """30 random layers with a large gain in bf16, in which rounding grows; a plan that halves them.

    The model, its graph, and name of a group → removed units.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=30, num_key_value_heads=4, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 3 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1)
    graph = prunekit.trace(model.bfloat16(), example())
    wanted = [group for group in graph.groups if group.kind in ("attention", "mlp")]
    return model, graph, {group.name: list(range(group.num_units // 2)) for group in wanted}


def logits_of(model):
    with torch.no_grad():
        return model(**example()).logits


def test_rounding_never_fails_a_cut(rough):
    dense, graph, removed = rough
    model = copy.deepcopy(dense)
    with SumsInHalves():
        prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
        with masked(dense, graph, removed):
            expected = logits_of(dense)
        difference = (logits_of(model) - expected).abs().max() / expected.abs().max()
    assert difference > 0.2, "the whole outputs in bf16 differ, and by rounding alone"
    shapes = {tuple(layer.mlp.up_proj.weight.shape) for layer in model.model.layers}
    assert shapes == {(48, 64)}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("parameter", "row"),
    [("model.layers.17.mlp.up_proj.weight", 3), ("model.layers.17.self_attn.v_proj.weight", 20)],
)
def test_one_wrong_row_fails_it_and_is_named(rough, parameter, row, monkeypatch):
    """A row of a removed unit stands where another row belongs."""
    dense, graph, removed = rough
    model = copy.deepcopy(dense)
    cut_right = cut.slice_tensor

    def cut_wrong(places, positions, changes):
        module, attribute, name = places[0]
        before = getattr(module, attribute).detach().clone()
        cut_right(places, positions, changes)
        if name == parameter:
            getattr(module, attribute).data[row] = before[positions[0][0]]

    monkeypatch.setattr(cut, "slice_tensor", cut_wrong)
    plan = {name: units for name, units in removed.items() if graph[name].layer in (16, 17, 18)}
    block = parameter.rsplit(".", 2)[0]
    fault = rf"^{block.removeprefix('model.')}: the input of {block}\.(down|o)_proj differs"
    with pytest.raises(SurgeryError, match=fault):
        prunekit.apply_plan(model, graph, prunekit.PruningPlan(plan))
    assert torch.equal(logits_of(model), logits_of(dense))


class Casts(TorchDispatchMode):
    """Counts the numbers of bf16 tensors that are held in float32 at one time."""

    def __init__(self):
        super().__init__()
        self.casts, self.most = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype) and (
            (args[0].dtype, output.dtype) == (torch.bfloat16, torch.float32)
        ):
            self.casts = [cast for cast in self.casts if cast() is not None]
            self.casts.append(weakref.ref(output))
            self.most = max(self.most, sum(cast().numel() for cast in self.casts))
        return output


def test_no_more_than_a_layer_is_held_wide():
    model = tiny_llama(layers=6).bfloat16()
    graph = prunekit.trace(model, example())
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    with Casts() as casts:
        prunekit.apply_plan(model, graph, prunekit.PruningPlan({"layers.1.mlp": [3]}))
    assert model.lm_head.weight.numel() <= casts.most <= layer


class Block(nn.Module):
    def __init__(self, loudness):
        super().__init__()
        self.up, self.down, self.loudness = nn.Linear(8, 12), nn.Linear(12, 8), loudness

    def forward(self, x):
        return x + self.loudness * self.down(self.up(x).relu())


class Plain(nn.Module):
    """A residual stream without norms, so that its channels can be cut exactly."""

    def __init__(self, loudness=1.0):
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(Block(loudness) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_residual_channels_are_compared_where_they_stay(dtype):
    model = randomise(Plain()).to(dtype)
    x = torch.randn(4, 5, dtype=dtype)
    graph = prunekit.trace(model, (x,))
    (channel,) = (group for group in graph.groups if group.exact and group.num_units == 8)
    removed = {channel.name: [1, 6], "layers.2": [0]}
    with masked(model, graph, removed), torch.no_grad():
        expected = model(x)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    assert model.layers[2].up.weight.shape == (11, 6)
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["layers.2.up.weight", "layers.2.down.weight"])
def test_a_whisper_is_judged_by_its_own_size(name, spoil):
    """What the third layer adds is a millionth of the hidden states beside it."""
    model = randomise(Plain(loudness=1e-6))
    graph = prunekit.trace(model, (torch.randn(4, 5),))
    spoil(name, lambda weight: weight.mul_(1.01))
    with pytest.raises(SurgeryError, match=r"^layers\.2: the (in|out)put of layers\.2\.down"):
        prunekit.apply_plan(model, graph, prunekit.PruningPlan({"layers.2": [0, 4]}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("massive", "row", "wrong", "group"),
    [
        ("mlp.up_proj", 20, "mlp.up_proj", "mlp"),
        ("self_attn.v_proj", 20, "self_attn.v_proj", "self_attn"),
        ("mlp.down_proj", 5, "mlp.down_proj", "mlp"),
    ],
)
def test_a_feature_is_judged_by_its_own_size(massive, row, wrong, group, dtype, spoil):
    """One feature is 100,000 times as large as those beside it; a row of another one is wrong."""
    model = tiny_llama().to(dtype)
    layer = model.model.layers[1]
    layer.get_submodule(massive).weight.data[row] *= 1e5
    graph = prunekit.trace(model, example())
    spoil(f"model.layers.1.{wrong}.weight", lambda weight: weight[8].mul_(1.5))
    with pytest.raises(SurgeryError, match=rf"^layers\.1\.{group}: the (in|out)put of .*_proj"):
        prunekit.apply_plan(model, graph, prunekit.PruningPlan({f"layers.1.{group}": [0]}))


def test_stacked_experts_are_judged_by_their_own_size(spoil):
    """What the experts add is a thousandth of what is beside it; rows of one expert are wrong."""
    model = build("mixtral", values_of("mixtral")).bfloat16()
    experts = "model.layers.1.mlp.experts"
    model.get_parameter(f"{experts}.down_proj").data.mul_(1e-3)
    graph = prunekit.trace(model, example())
    plan = prunekit.PruningPlan({"layers.1.mlp.experts": list(range(8))})
    spoil(f"{experts}.gate_up_proj", lambda weight: weight[2, 3].mul_(1.5))
    with pytest.raises(
        SurgeryError, match=rf"^layers\.1\.mlp\.experts: the output of {experts} di"
    ):
        prunekit.apply_plan(model, graph, plan)


@pytest.mark.parametrize("expert", [0, 13, 31])
@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_every_stacked_expert_is_compared(expert, parameter, spoil):
    """Two tokens reach four of 32 experts at most; the others get tokens of the check's own."""
    sizes = {"num_experts": 32, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    model = build("qwen3_moe", values_of("qwen3_moe") | sizes)
    graph = prunekit.trace(model, example(1, 2))
    experts = "model.layers.0.mlp.experts"
    spoil(f"{experts}.{parameter}", lambda weight: weight[expert, 3].mul_(1.5))
    with pytest.raises(SurgeryError, match=rf"the output of {experts} differs"):
        prunekit.apply_plan(
            model, graph, prunekit.PruningPlan({"layers.0.mlp.experts": [*range(8)]})
        )


class Picky(nn.Linear):
    """A linear layer whose kernel for half precision takes certain widths only."""

    def forward(self, x):
        if x.dtype == torch.bfloat16 and x.shape[-1] % 4:
            raise RuntimeError("expected a multiple of 4")
        return super().forward(x)


@pytest.mark.parametrize("units", [[0, 1, 2], [0, 1, 2, 3]])
def test_a_model_that_runs_only_as_it_is_checked_is_refused(units):
    model = randomise(Plain())
    model.layers[2].down = randomise(Picky(12, 8))
    model = model.bfloat16()
    graph = prunekit.trace(model, (torch.randn(4, 5, dtype=torch.bfloat16),))
    plan = prunekit.PruningPlan({"layers.2": units})
    if len(units) == 4:
        prunekit.apply_plan(model, graph, plan)
        return
    with pytest.raises(SurgeryError, match="the cut model doesn't run: expected a multiple of 4"):
        prunekit.apply_plan(model, graph, plan)
    assert model.layers[2].down.weight.shape == (8, 12)


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_hides_no_difference(odd):
    """Where both tensors hold the same infinity, or no number, the others are still compared."""
    layer = Probe(path="layers.0", module=nn.Identity(), is_layer=True)
    recording = Recording(probes=[layer], remainder=None, wide=torch.float32, tolerance=1e-4)
    before = torch.randn(2, 3, 4)
    expected = torch.randn(2, 3, 4)
    expected[0, 1, 2] = odd
    recording._judge(layer, "output", expected, expected.clone(), before)
    for place in ((1, 2, 2), (0, 1, 2), (0, 0, 0)):
        actual = expected.clone()
        actual[place] = 0.5
        with pytest.raises(Mismatch, match="the output of layers.0 differs"):
            recording._judge(layer, "output", expected, actual, before)


def test_outputs_that_can_t_be_compared_must_be_finite():
    outputs = [torch.ones(3)], [torch.tensor([1.0, torch.nan, 2.0])]
    fault = check.compare_outputs(*outputs, None)
    assert fault.text == "the cut model's outputs hold NaN or infinity"
    assert check.compare_outputs([torch.ones(3)], [torch.zeros(3)], None) is None


def state_of(model):
    """What an interrupted check might leave: hooks, casts, modes, settings."""
    backends = torch.backends
    return (
        {name: (p.dtype, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [module.training for module in model.modules()],
        _get_current_dispatch_mode_stack(),
        [backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision],
        backends.mkldnn.matmul.fp32_precision,
    )


@pytest.mark.parametrize("at", range(1, 11))
def test_an_interruption_inside_any_forward_pass_leaves_nothing(at, monkeypatch):
    """Three layers, run by the masked model, by the cut one, and by this one in its own type; the
    tenth call is never made.
    """
    model = tiny_llama().bfloat16().train()
    graph = prunekit.trace(model, example())
    before, weights = state_of(model), copy.deepcopy(model.state_dict())
    forward, calls = LlamaDecoderLayer.forward, []

    def interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    plan = prunekit.PruningPlan({"layers.1.mlp": [3], "layers.0.self_attn": [1]})
    monkeypatch.setattr(LlamaDecoderLayer, "forward", interrupt)
    if at == 10:
        prunekit.apply_plan(model, graph, plan)
        assert len(calls) == 9
        assert state_of(model)[1:] == before[1:]
        return
    with pytest.raises(KeyboardInterrupt):
        prunekit.apply_plan(model, graph, plan)
    assert state_of(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def traced(monkeypatch):
    """The numbers of layers that are traced to count units."""
    numbers, trace = [], counting.trace

    def note(model, inputs):
        numbers.append(len(model.model.layers))
        return trace(model, inputs)

    monkeypatch.setattr(counting, "trace", note)
    return numbers


def test_nothing_is_counted_where_every_consumer_was_compared(traced):
    model = tiny_llama()
    graph = prunekit.trace(model, example())
    plan = {"layers": [1], "layers.0.mlp": [1, 2], "layers.2.self_attn": [0]}
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(plan))
    assert traced == []


@pytest.mark.parametrize("on_meta", [False, True])
def test_units_are_counted_in_one_layer_of_each_structure(traced, on_meta):
    model = tiny_llama(layers=5)
    model = model.to("meta") if on_meta else model
    graph = prunekit.trace(model, example())
    (channel,) = (group.name for group in graph.groups if group.kind == "channel")
    plan = {channel: [0, 5], "layers.3.mlp": [7], "layers": [1]}
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(plan))
    assert traced[-1] == 2, "layer 3, and one for layers 0, 2 and 4"
    assert model.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


def test_a_wrong_number_of_units_is_found_in_a_layer_left_out(monkeypatch):
    """Each structure is counted, wherever its first layer stands."""
    model = tiny_llama(layers=4).to("meta")
    graph = prunekit.trace(model, example())
    cut_right = cut._cut_units

    def cut_wrong(model, graph, removed, attempt, changes):
        wrong = [name for name in removed if graph[name].layer == 2]
        removed = removed | {name: removed[name][:1] for name in wrong}
        cut_right(model, graph, removed, attempt, changes)

    monkeypatch.setattr(cut, "_cut_units", cut_wrong)
    plan = {f"layers.{layer}.mlp": [0, 1] for layer in range(4)}
    with pytest.raises(SurgeryError, match=r"^layers\.2\.mlp: the cut model reads \[39\] units"):
        prunekit.apply_plan(model, graph, prunekit.PruningPlan(plan))


class Adapted(nn.Module):
    """Layers that are alike; after every second one, the adapter of its own runs."""

    def __init__(self):
        super().__init__()
        self.layers, self.adapters = (
            nn.ModuleList(
                nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 12))
                for _ in range(4)
            )
            for width in (24, 6)
        )

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = x + layer(x)
            if index % 2:
                x = x + self.adapters[index](x)
        return x


def test_adapters_are_counted_in_the_layers_that_they_belong_to():
    """No layer is passed over for being like an earlier one: adapters are taken by its index."""
    model = Adapted().to("meta")
    graph = prunekit.trace(model, (torch.randn(2, 3, 12),))
    removed = {f"adapters.{index}": [0, 1] for index in (1, 3)} | {"layers.2": [0]}
    prunekit.apply_plan(model, graph, prunekit.PruningPlan(removed))
    assert [adapter[0].out_features for adapter in model.adapters] == [6, 4, 6, 4]
    assert counting.count_units(model, graph, removed) is None
    fault = counting.count_units(model, graph, {**removed, "adapters.3": [0]})
    assert (fault.group, fault.text[-17:]) == ("adapters.3", "where 5 were left")


def test_attention_that_takes_half_precision_only():
    """Flash attention is one such; the check computes attention by plain operators."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module, query, *args, **kwargs):
        assert query.dtype == torch.bfloat16, "half precision only"
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("half_only", attend)
    model = tiny_llama().bfloat16()
    graph = prunekit.trace(model, example())
    model.config._attn_implementation = "half_only"
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({"layers.1.self_attn": [3]}))
    assert model.config._attn_implementation == "half_only"
    assert model(**example()).logits.dtype == torch.bfloat16


def test_outputs_beside_the_logits_are_compared_too():
    """The loss, in float32 as well."""
    model = tiny_llama(layers=2).bfloat16()
    inputs = example() | {"labels": token_ids(2, 7, seed=4)}
    graph = prunekit.trace(model, inputs)
    prunekit.apply_plan(model, graph, prunekit.PruningPlan({"layers.1.mlp": [3]}))
    assert model.model.layers[1].mlp.up_proj.weight.shape == (39, 48)
