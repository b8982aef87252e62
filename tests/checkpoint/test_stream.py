"""A model larger than memory: its weights come from shards layer by layer, and go to new ones."""

import copy
import errno
import json

import pytest
import torch
from conftest import example, randomise, tiny_llama, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.checkpoint import LayerWriter, Shards, Weights, offloaded, open_streamed
from prunekit.errors import CheckpointError, DataError, SurgeryError
from prunekit.evaluation.perplexity import perplexity
from prunekit.model.modeling_prunekit import per_layer_overrides
from prunekit.surgery.cut import cut_layer

IDS = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
NEW = IDS | {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": (NEW, torch.float32),
    "gpt2": (IDS | {"n_embd": 48, "n_head": 8, "n_layer": 3, "n_positions": 64}, torch.float32),
    "gemma2": (NEW, torch.float32),
    "qwen3": (NEW, torch.bfloat16),
    "gemma3_text": (NEW, torch.bfloat16),
}
LAYERS = {"gpt2": "transformer.h"}
UP = "model.layers.1.mlp.up_proj.weight"


def build(family):
    values, dtype = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **values)
    config.dtype = dtype
    return randomise(AutoModelForCausalLM.from_config(config, dtype=dtype))


def saved(model, folder, shard="8KB"):
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def all_layers(family="llama", layers=3):
    return [f"{LAYERS.get(family, 'model.layers')}.{i}" for i in range(layers)]


def written(
    model,
    shards,
    weights,
    folder,
    list_path="model.layers",
    dtype=None,
    change=lambda _: None,
    measure=lambda _: None,
):
    writer = LayerWriter(folder, dtype)
    writer.copy(shards, weights.outside_names(list_path))
    for i in range(len(model.get_submodule(list_path))):
        with weights.enter(f"{list_path}.{i}"):
            change(i)
            writer.write(f"{list_path}.{i}", weights.state(f"{list_path}.{i}"))
    measure(writer)
    writer.finish(model)
    return prunekit.from_pretrained(folder)


def same(left, right):
    right = right.state_dict()
    return all(
        t.dtype == right[n].dtype and torch.equal(t, right[n]) for n, t in left.state_dict().items()
    )


def values_of(model):
    return {
        name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"
    }


def live_bytes(model):
    return sum(p.numel() * p.itemsize for p in model.parameters() if not p.is_meta)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_through_is_bit_equal(tmp_path, family):
    model, dtype = build(family), FAMILIES[family][1]
    saved(model, tmp_path / "dense")
    streamed, shards = open_streamed(tmp_path / "dense", torch.float32)
    assert all(p.is_meta and p.dtype == torch.float32 for p in streamed.parameters())
    assert not any(b.is_meta for b in streamed.buffers()) and not streamed.training
    assert shards.num_bytes == sum(p.numel() * p.itemsize for p in model.parameters())
    assert shards.dtype == dtype and streamed.config.dtype == torch.float32
    weights = Weights(streamed, shards)
    again = written(
        streamed, shards, weights, tmp_path / "out", LAYERS.get(family, "model.layers"), dtype
    )
    assert same(model, again) and live_bytes(streamed) == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(model, stock) and values_of(stock) == values_of(model)
    assert len(list((tmp_path / "out").glob("model-0000?-of-0000?.safetensors"))) == 3 + len(
        weights.outside_names(LAYERS.get(family, "model.layers"))
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == shards.num_bytes
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_model_runs_as_a_loaded_one(tmp_path, family):
    saved(build(family), tmp_path / "dense")
    loaded = prunekit.from_pretrained(tmp_path / "dense")
    for parameter in loaded.parameters():
        parameter.data = parameter.data.float()
    model, shards = open_streamed(tmp_path / "dense", torch.float32)
    before, live = dict(model.named_parameters()), []
    hooks = [
        m.register_forward_pre_hook(lambda *_: live.append(live_bytes(model)))
        for m in model.modules()
    ]
    ids = token_ids(4, 9)
    with offloaded(model, shards):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, loaded(ids).logits)
        assert perplexity(model, ids, device="cpu") == perplexity(loaded, ids)
        generated = model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)
        assert torch.equal(
            generated, loaded.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)
        )
    for hook in hooks:
        hook.remove()
    largest = max(
        *(live_bytes(layer) for layer in loaded.get_submodule(LAYERS.get(family, "model.layers"))),
        live_bytes(loaded.get_input_embeddings()),
    )
    assert 0 < max(live) <= largest and live_bytes(model) == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(
        p.shape == before[n].shape and not p.is_inference() for n, p in model.named_parameters()
    )


def test_weights_that_are_read_past_their_module(tmp_path):
    """A layer that uses a child's weight without calling the child, and parameters of its own."""
    model = saved_model = build("llama")
    saved(saved_model, tmp_path / "dense")
    streamed, shards = open_streamed(tmp_path / "dense")

    def past(self, x):
        return torch.nn.functional.linear(
            self.act_fn(self.gate_proj.weight @ x.mT).mT * self.up_proj(x), self.down_proj.weight
        )

    for one in (model, streamed):
        for layer in one.model.layers:
            layer.mlp.forward = past.__get__(layer.mlp)
    with offloaded(streamed, shards), torch.no_grad():
        assert torch.equal(streamed(token_ids()).logits, model(token_ids()).logits)


def test_an_offloaded_model_that_fails_lets_go(tmp_path):
    saved(build("llama"), tmp_path / "dense")
    model, shards = open_streamed(tmp_path / "dense")
    with offloaded(model, shards), pytest.raises(IndexError):
        model(torch.tensor([[1000]]))
    assert live_bytes(model) == 0


def test_pruned_folders_are_streamed_too(tmp_path):
    model = tiny_llama(4, layers=3)
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = None  # given one by the compensation
    chosen = ["importance=fluctuation", "compensation=bias", "policy=uniform", "groups=mlp"]
    prunekit.prune(model, ratio=0.2, method="llm_pruner", calibration=token_ids(), overrides=chosen)
    prunekit.save_pretrained(model, tmp_path / "pruned")
    streamed, shards = open_streamed(tmp_path / "pruned")
    assert per_layer_overrides(streamed.config) == per_layer_overrides(model.config)
    with offloaded(streamed, shards), torch.no_grad():
        assert torch.equal(streamed(token_ids()).logits, model(token_ids()).logits)
    assert same(model, written(streamed, shards, Weights(streamed, shards), tmp_path / "out"))


def test_a_body_without_its_prefix(tmp_path):
    model = build("gpt2")
    tensors = {
        n.removeprefix("transformer."): t
        for n, t in model.state_dict().items()
        if n != "lm_head.weight"
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # a mask that older checkpoints hold
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    streamed, shards = open_streamed(tmp_path)
    with offloaded(streamed, shards), torch.no_grad():
        assert torch.equal(streamed(token_ids()).logits, model(token_ids()).logits)


def test_names_that_a_class_has_given_up(tmp_path):
    config = AutoConfig.for_model("gpt_neox", **NEW | {"hidden_size": 64})
    model = randomise(AutoModelForCausalLM.from_config(config))
    tensors = load_file(saved(model, tmp_path, "1GB") / "model.safetensors")
    assert "embed_out.weight" in tensors
    streamed, shards = open_streamed(tmp_path)
    with offloaded(streamed, shards), torch.no_grad():
        assert torch.equal(streamed(token_ids()).logits, model(token_ids()).logits)


def changed(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def replaced(name, value):
    return lambda tensors: tensors.__setitem__(
        name, value(tensors[name]) if name in tensors else value(None)
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(UP), f"{UP} is missing"),
        (replaced("extra", lambda _: torch.zeros(3)), "no place for extra"),
        (
            replaced(UP, lambda t: t[1:].clone()),
            rf"{UP}: expected shape \(40, 48\), got \(39, 48\)",
        ),
        (replaced(UP, lambda t: t.to(torch.float8_e4m3fn)), f"{UP} is stored as F8_E4M3"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, match):
    saved(build("llama"), tmp_path, "1GB")
    changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_streamed(tmp_path)
    assert "\n" not in str(caught.value)


def test_tied_weights_that_differ(tmp_path):
    saved(build("gemma2"), tmp_path, "1GB")
    changed(tmp_path, replaced("lm_head.weight", lambda _: torch.zeros(97, 48)))
    with pytest.raises(CheckpointError, match="differ, but its config ties them"):
        open_streamed(tmp_path)
    changed(
        tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    streamed, _ = open_streamed(tmp_path)
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight


LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 6,
}
PARTS = {  # families whose checkpoints hold some parameters in parts; more than ten experts
    "mixtral": NEW | {"num_local_experts": 12},
    "deepseek_v3": NEW
    | LATENT
    | {
        "num_key_value_heads": 8,
        "n_routed_experts": 12,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 8,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "olmo_hybrid": NEW
    | {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
    },
}


def in_parts(family, folder):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **PARTS[family])
    model = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    saved(model, folder, "1GB")
    return model


def scattered(folder, files=5):
    """The tensors of a folder's one file dealt out to several, in an order of their own."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {
        name: f"model-{i % files}.safetensors"
        for i, name in enumerate(sorted(tensors, reverse=True))
    }
    for file in set(names.values()):
        save_file(
            {n: t for n, t in tensors.items() if names[n] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": names})
    )


@pytest.mark.parametrize("family", PARTS)
def test_parameters_that_are_stored_in_parts(tmp_path, family):
    in_parts(family, tmp_path / "dense")
    scattered(tmp_path / "dense")
    model = prunekit.from_pretrained(
        tmp_path / "dense"
    )  # some of its numbers are wider than they are stored
    streamed, shards = open_streamed(tmp_path / "dense")
    assert shards.num_bytes == Shards.of_folder(tmp_path / "dense").num_bytes
    parts = {
        name: [part for part, _ in shards[name].places(torch.empty(shards[name].shape))]
        for name in shards
    }
    names = [name for name, found in parts.items() if len(found) > 1]
    assert names and all(name in dict(model.named_parameters()) for name in names)
    assert all(len({part.file for part in parts[name]}) > 1 for name in names)
    assert shards.equal(names[0], names[0]) and not shards.equal(names[0], names[-1])
    read = shards.read([names[0]], dtype=torch.float32)[names[0]]
    assert torch.equal(read, model.get_parameter(names[0]).float())
    weights = Weights(streamed, shards)
    assert (
        same(model, written(streamed, shards, weights, tmp_path / "out"))
        and live_bytes(streamed) == 0
    )
    assert same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    writer = LayerWriter(tmp_path / "copied")
    writer.copy(shards, {names[0]: names[0]})
    assert torch.equal(writer.shards.read(names[:1])[names[0]], model.get_parameter(names[0]))


MLP = "model.layers.2.block_sparse_moe.experts"
OURS = r"model\.layers\.2\.mlp\.experts"


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def more(shape, *names):
    return lambda tensors: tensors.update({name: torch.zeros(shape) for name in names})


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        (
            "mixtral",
            without(f"{MLP}.3.w3.weight"),
            f"damaged weights: {MLP}.3.w3.weight is missing",
        ),
        ("mixtral", without(f"{MLP}.11.w2.weight"), f"{MLP}.11.w2.weight is missing"),
        (
            "mixtral",
            without(*(f"{MLP}.{i}.w1.weight" for i in range(12))),
            f"{MLP}.0.w1.weight is missing",
        ),
        (
            "mixtral",
            without(*(f"{MLP}.{i}.w2.weight" for i in range(12))),
            f"{OURS}.down_proj is missing",
        ),
        (
            "olmo_hybrid",
            without("model.layers.0.linear_attn.k_conv1d.weight"),
            "0.linear_attn.k_conv1d.weight is miss",
        ),
        (
            "mixtral",
            more((47, 40), f"{MLP}.0.w2.weight"),
            rf"model.safetensors: {MLP}.0.w2.weight: expected shape \(48, 40\), got \(47, 40\)",
        ),
        (
            "mixtral",
            more((40, 47), *(f"{MLP}.{i}.w1.weight" for i in range(12))),
            f"{OURS}.gate_up_proj: Sizes of",
        ),
        (
            "mixtral",
            more((48, 40), f"{MLP}.12.w2.weight"),
            rf"{OURS}.down_proj: expected shape \(12, 48, 40\), got \(13, 48, 40\)",
        ),
        (
            "mixtral",
            more((40, 48), "model.layers.7.mlp.experts.0.w1.weight"),
            "place for model.layers.7.mlp.exp",
        ),
    ],
)
def test_parts_that_do_not_fit(tmp_path, family, change, match):
    in_parts(family, tmp_path)
    changed(tmp_path, change)
    with pytest.raises(CheckpointError, match=match) as caught:
        open_streamed(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "loaded whole" not in str(caught.value)


def test_tensors_that_are_more_than_laid_side_by_side(tmp_path):
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("hrm_text", **NEW | {"num_key_value_heads": 8})
    )
    saved(model, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"is made by Chunk\(dim=0\) of .*must be loaded whole"
    ) as caught:
        open_streamed(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [lambda b: b[:-100], lambda b: b[:40], lambda b: b"", lambda b: None]
)
def test_a_shard_cut_short(tmp_path, change):
    saved(build("llama"), tmp_path, "64KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = change(shard.read_bytes())
    shard.unlink() if content is None else shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=shard.name) as caught:
        open_streamed(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_shard_cut_short_meanwhile(tmp_path):
    saved(build("llama"), tmp_path, "1GB")
    model, shards = open_streamed(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged weights"):
        Weights(model, shards).load("model.layers.0")


@pytest.mark.parametrize(
    "index", ["[]", "{", '{"weight_map": {"a": "gone.safetensors"}}', '{"weight_map": 3}']
)
def test_a_damaged_index(tmp_path, index):
    saved(build("llama"), tmp_path, "64KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="damaged|gone.safetensors"):
        open_streamed(tmp_path)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="expected a local model folder"):
        open_streamed("nobody/nothing")
    with pytest.raises(CheckpointError, match="expected safetensors"):
        open_streamed(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path, value):
    saved(build("llama"), tmp_path, "1GB")
    changed(tmp_path, lambda t: t[UP].view(-1)[7].fill_(value))
    model, shards = open_streamed(tmp_path)
    weights = Weights(model, shards)
    weights.load("model.layers.0")
    with (
        pytest.raises(DataError, match=f"{UP}: the weights hold NaN"),
        weights.enter("model.layers.1"),
    ):
        pass
    assert all(p.is_meta for p in model.model.layers[1].parameters())


def test_loading_keeps_the_rest_on_meta(tmp_path):
    dense = build("gemma2")
    saved(dense, tmp_path)
    model, shards = open_streamed(tmp_path)
    weights = Weights(model, shards)
    with weights.outside("model.layers"):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.model.norm.weight, dense.model.norm.weight)
        assert all(p.is_meta for p in model.model.layers.parameters())
        with weights.enter("model.layers.2") as layer:
            assert same(dense.model.layers[2], layer) and layer.mlp.up_proj.in_features == 48
            assert all(p.is_meta for p in model.model.layers[1].parameters())
        assert not model.lm_head.weight.is_meta
    assert live_bytes(model) == 0 and model.lm_head.weight is model.model.embed_tokens.weight


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_and_going_on(tmp_path, monkeypatch):
    import safetensors.torch

    dense = build("llama")
    saved(dense, tmp_path / "dense")
    model, shards = open_streamed(tmp_path / "dense")
    weights = Weights(model, shards)
    writer = LayerWriter(tmp_path / "out")
    with weights.enter("model.layers.0"):
        writer.write("model.layers.0", weights.state("model.layers.0"))
    with monkeypatch.context() as patch, weights.enter("model.layers.1"):
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            writer.write("model.layers.1", weights.state("model.layers.1"))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="an interrupted run"):
        LayerWriter(tmp_path / "out")
    (tmp_path / ".out.partial" / ".model.layers.2.tmp").write_bytes(b"half")
    (tmp_path / ".out.partial" / "model.layers.2.safetensors").write_bytes(b"half")
    writer = LayerWriter(tmp_path / "out", resume=True)
    assert [writer.has(path) for path in all_layers()] == [True, False, False]
    with pytest.raises(CheckpointError, match="was not written"):
        writer.finish(model)
    for path in all_layers()[1:]:
        with weights.enter(path):
            writer.write(path, weights.state(path))
    writer.copy(shards, weights.outside_names("model.layers"))
    with monkeypatch.context() as patch:  # at the very end
        patch.setattr("prunekit.checkpoint.writer.write_manifest", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            writer.finish(model)
    assert not (tmp_path / "out").exists()
    writer = LayerWriter(tmp_path / "out", resume=True)
    assert all(map(writer.has, [*all_layers(), *weights.outside_names("model.layers")]))
    writer.finish(model)
    assert same(dense, prunekit.from_pretrained(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        LayerWriter(tmp_path / "out", resume=True)


def test_what_was_written_must_be_the_model(tmp_path):
    saved(build("llama"), tmp_path / "dense")
    model, shards = open_streamed(tmp_path / "dense")
    weights = Weights(model, shards)
    writer = LayerWriter(tmp_path / "out")
    writer.copy(shards, {name: name for name in shards})
    writer.write("extra", {"extra": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="no place for extra"):
        writer.finish(model)
    writer.write("extra", {UP: torch.zeros(3, 48)})
    with pytest.raises(
        CheckpointError, match=rf"{UP}: expected shape \(40, 48\), written \(3, 48\)"
    ):
        writer.finish(model)
    writer.abandon()
    assert weights.outside_names("model.layers").keys() <= set(shards)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def plan_of(graph, uneven=True):
    """Units of every group in a layer: more of them the deeper it lies, or half of them."""
    removed = {}
    for group in graph.groups:
        if (
            group.prunable
            and group.kind in ("attention", "mlp", "query_head")
            and group.num_units > 1
        ):
            count = min(group.num_units - 1, 1 + group.layer) if uneven else group.num_units // 2
            removed[group.name] = list(range(count))
    return removed


def plan_of_nothing_left(graph):
    """A layer without attention, one without FFN, one without both."""
    layers = {"attention": (0, 2), "mlp": (1, 2)}
    return {
        group.name: list(range(group.num_units))
        for group in graph.groups
        if group.layer in layers.get(group.kind, ())
    }


def by_layer(graph, removed):
    layers = sorted({graph[name].layer for name in removed})
    return [
        {name: units for name, units in removed.items() if graph[name].layer == layer}
        for layer in layers
    ]


@pytest.mark.parametrize(
    ("family", "uneven"),
    [
        *((family, True) for family in FAMILIES),
        *((family, False) for family in FAMILIES if family not in LAYERS),
        ("llama", None),
        ("gpt2", None),
    ],
)
def test_cut_layer_by_layer_is_cut_at_once(tmp_path, family, uneven):
    whole = build(family)
    saved(whole, tmp_path / "dense")
    model, shards = open_streamed(tmp_path / "dense")
    graph = prunekit.trace(model, example())
    assert graph.fingerprint == prunekit.trace(whole, example()).fingerprint
    removed = plan_of_nothing_left(graph) if uneven is None else plan_of(graph, uneven)
    prunekit.apply_plan(whole, graph, prunekit.PruningPlan(removed))
    per_layer = by_layer(graph, removed)
    weights, logits = Weights(model, shards), []

    def run(writer):
        with offloaded(model, writer.shards), torch.no_grad():
            logits.append(model(token_ids()).logits)

    again = written(
        model,
        shards,
        weights,
        tmp_path / "out",
        LAYERS.get(family, "model.layers"),
        change=lambda i: cut_layer(model, graph, per_layer[i]),
        measure=run,
    )
    assert (
        per_layer_overrides(model.config)
        == per_layer_overrides(whole.config)
        == per_layer_overrides(again.config)
    )
    assert values_of(model) == values_of(whole)
    assert same(whole, again)
    for path, module in whole.named_modules():
        own = {n: v for n, v in vars(module).items() if type(v) is int}
        assert {
            n: v for n, v in vars(model.get_submodule(path)).items() if type(v) is int
        } == own, path
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, whole(token_ids()).logits)
        if whole.dtype == torch.float32:
            assert torch.equal(logits[0], whole(token_ids()).logits)
    loaded, stored = open_streamed(tmp_path / "out")
    with offloaded(loaded, stored), torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, whole(token_ids()).logits)


def test_a_cut_that_is_undone():
    model = tiny_llama(4)
    graph = prunekit.trace(model, example())
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    changes = cut_layer(model, graph, {"layers.1.mlp": [0, 3], "layers.1.self_attn": [1]})
    assert model.model.layers[1].mlp.up_proj.out_features == 38
    assert model.config.per_layer_config[1].num_attention_heads == 6
    changes.undo()
    assert same(model, model) and all(
        torch.equal(t, before[n]) for n, t in model.state_dict().items()
    )
    assert (
        model.config.to_dict() == config
        and model.model.layers[1].self_attn.num_key_value_groups == 2
    )
    with pytest.raises(SurgeryError, match="expected groups of one layer"):
        cut_layer(model, graph, {"layers.1.mlp": [0], "layers.2.mlp": [0]})


def test_an_error_while_cutting_leaves_the_layer(monkeypatch):
    model = tiny_llama(4)
    graph = prunekit.trace(model, example())

    def fails(*_):
        raise RuntimeError("no")

    monkeypatch.setattr("prunekit.surgery.configs.set_per_layer", fails)
    config = model.config.to_dict()
    with pytest.raises(RuntimeError):
        cut_layer(model, graph, {"layers.1.mlp": [0, 3]})
    assert (
        model.model.layers[1].mlp.up_proj.weight.shape == (40, 48)
        and model.config.to_dict() == config
    )


def test_never_more_than_a_layer(tmp_path):
    """A folder of about 100 MB, itself written layer by layer, goes through layer by layer."""
    config = AutoConfig.for_model(
        "llama",
        **NEW
        | {"hidden_size": 512, "intermediate_size": 1600, "head_dim": 64, "num_hidden_layers": 8},
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder = tmp_path / "dense"
    config.save_pretrained(tmp_path)
    writer = LayerWriter(folder, torch.float32)
    for name, parameter in model.named_parameters():
        writer.write(name, {name: torch.randn(parameter.shape)})
    model, shards = build_from(config, writer)
    live, weights = [], Weights(model, shards)
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    outside = sum(p.numel() * 4 for n, p in model.named_parameters() if ".layers." not in n)
    assert shards.num_bytes == 8 * layer + outside > 90e6
    out = LayerWriter(tmp_path / "out", torch.bfloat16)
    with weights.outside("model.layers"):
        for path in all_layers(layers=8):
            with weights.enter(path):
                live.append(live_bytes(model))
                out.write(path, weights.state(path))
    out.copy(shards, weights.outside_names("model.layers"))
    assert set(live) == {layer + outside} and live_bytes(model) == 0
    out.finish(model)
    assert Shards.of_folder(tmp_path / "out").num_bytes * 2 == shards.num_bytes


def build_from(config, writer):
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    writer.finish(model)
    return open_streamed(writer.target)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_loop_of_a_layerwise_run(tmp_path, family):
    """Activations stream; each layer is cut while it is there; masked and cut layers agree."""
    whole, path = build(family), LAYERS.get(family, "model.layers")
    saved(whole, tmp_path / "dense")
    model, shards = open_streamed(tmp_path / "dense")
    weights, writer = Weights(model, shards), LayerWriter(tmp_path / "out")
    graph, layers, calls = prunekit.trace(model, example()), model.get_submodule(path), []
    removed = plan_of(graph)

    def record(layer):
        return lambda hidden, *args, **kwargs: calls.append((hidden, args, kwargs)) or hidden

    for layer in layers:
        layer.forward = record(layer)
    with weights.outside(path), torch.no_grad():
        model(**example())
    for layer in layers:
        del layer.forward
    hidden = calls[0][0]
    for i, units in enumerate(by_layer(graph, removed)):
        with weights.enter(f"{path}.{i}") as layer, torch.no_grad():
            masked = copy.deepcopy(layer)
            changes = cut_layer(model, graph, units)
            for name in units:
                for member in graph[name].consumers:
                    weight = masked.get_parameter(member.parameter.removeprefix(f"{path}.{i}."))
                    weight.index_fill_(member.dim, member.index[units[name]].flatten(), 0)
            outputs = [one(hidden, *calls[i][1], **calls[i][2]) for one in (masked, layer)]
            expected, hidden = (
                output if torch.is_tensor(output) else output[0] for output in outputs
            )
            torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-4)
            del changes  # it holds the uncut weights
            writer.write(f"{path}.{i}", weights.state(f"{path}.{i}"))
    writer.copy(shards, weights.outside_names(path))
    writer.finish(model)
    prunekit.apply_plan(whole, graph, prunekit.PruningPlan(removed))
    assert same(whole, prunekit.from_pretrained(tmp_path / "out"))
