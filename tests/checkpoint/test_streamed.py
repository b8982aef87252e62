"""Models whose layers come from disk one by one, against the same models loaded whole."""

import errno
import threading
import time

import pytest
import safetensors.torch
import torch
from conftest import example, tiny_llama, token_ids
from families import EXPERTS, FIRST, MORE, NAMED, build
from safetensors.torch import load_file, save_file

import prunekit
from prunekit import config as cfg
from prunekit.checkpoint import LayerWriter, Shards, Weights
from prunekit.checkpoint.streamed import Streamed, StreamedLayers
from prunekit.errors import CheckpointError, ConfigError, DataError, SurgeryError
from prunekit.pipeline import prune_model
from prunekit.runtime.stages import Stages
from prunekit.schedules.folders import Folders
from prunekit.schedules.method import Method
from prunekit.surgery.probes import Recording

ONE_BY_ONE = {  # families whose checkpoints hold experts one by one
    "mixtral": EXPERTS["mixtral"] | {"num_key_value_heads": 2},
    "qwen2_moe": EXPERTS["qwen2_moe"] | {"num_key_value_heads": 8},
    "qwen3_moe": MORE["qwen3_moe"]
    | {"num_experts": 12, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "olmoe": NAMED | {"num_key_value_heads": 4, "num_experts": 3, "num_experts_per_tok": 2},
    "glm4_moe": MORE["glm4_moe"] | {"num_hidden_layers": 3, "first_k_dense_replace": 1},
}
BATCHES = [{"input_ids": part, "use_cache": False} for part in token_ids(16, 12).split(6)]
CPU = torch.device("cpu")


def stream(folder, *overrides):
    """Prune the model in `folder/dense` layer by layer into `folder/pruned`."""
    config = cfg.check(cfg.compose(["output_dir=none", *overrides]))
    streamed = Streamed(folder / "dense", CPU, None, False)
    folders = Folders(model=folder / "pruned", state=folder / "state")
    method = Method.build(config)
    result = prune_model(
        streamed.model, config, method, BATCHES, Stages(CPU), folders=folders, streamed=streamed
    )
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    streamed.writer.finish(streamed.model)
    return result


def assert_equals_whole(folder, *overrides):
    """What was streamed is what pruning the whole model leaves, bit for bit."""
    result = stream(folder, *overrides)
    whole = prunekit.from_pretrained(folder / "dense")
    config = cfg.check(cfg.compose(["output_dir=none", *overrides]))
    assert (
        prune_model(whole, config, Method.build(config), BATCHES, Stages(CPU)).plan == result.plan
    )
    assert_same(prunekit.from_pretrained(folder / "pruned"), whole)
    return whole


def assert_same(loaded, whole):
    tensors = loaded.state_dict()
    assert tensors.keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(**BATCHES[0]).logits, whole(**BATCHES[0]).logits)


@pytest.mark.parametrize(
    "family", ["olmo2", "qwen3", "opt", "gpt_neox", "cohere"]
)  # olmo2's heads share a norm
def test_streamed_equals_whole(family, tmp_path):
    prunekit.save_pretrained(build(family, FIRST[family], "sdpa", "eager"), tmp_path / "dense")
    assert_equals_whole(tmp_path, "ratio=0.3")


def test_streamed_with_token_weights_equals_whole(tmp_path):
    prunekit.save_pretrained(build("qwen3", FIRST["qwen3"], "sdpa"), tmp_path / "dense")
    with pytest.raises(ConfigError, match="tokens=gradient: expected the whole model in memory"):
        stream(tmp_path, "compensation.tokens=gradient")
    weights = ["importance.tokens=clipped", "compensation.tokens=relative"]
    assert_equals_whole(tmp_path, "ratio=0.3", *weights)


def test_layers_that_return_the_weights_of_their_attention_are_streamed(tmp_path):
    values = {"attn_layer_indices": [1], "mamba_n_heads": 6, "mamba_d_head": 16}
    values |= {"mamba_d_state": 12, "mamba_chunk_size": 16, "intermediate_size": 40}
    values |= {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    model = build("bamba", values | {"num_attention_heads": 8, "num_key_value_heads": 4})
    prunekit.save_pretrained(model, tmp_path / "dense")
    assert_equals_whole(tmp_path, "ratio=0.2")


@pytest.mark.parametrize(
    ("family", "group", "parameter", "place"),
    [
        ("qwen3", "self_attn", "self_attn.v_proj", "input of model.layers.1.self_attn.o_proj"),
        ("qwen3", "mlp", "mlp.down_proj", "output of model.layers.1.mlp.down_proj"),
        # Heads that share a norm can't be masked; what is cut beside them is compared all the same.
        ("olmo2", "mlp", "mlp.up_proj", "input of model.layers.1.mlp.down_proj"),
    ],
)
def test_a_wrong_cut_of_a_streamed_layer_is_found(family, group, parameter, place, tmp_path, spoil):
    prunekit.save_pretrained(build(family, FIRST[family], "sdpa"), tmp_path / "dense")
    spoil(f"model.layers.1.{parameter}.weight", lambda weight: weight[3].mul_(1.5))
    fault = rf"^layers\.1\.{group}: the {place} differs"
    with pytest.raises(SurgeryError, match=fault):
        stream(tmp_path, "ratio=0.3")
    assert not (tmp_path / "pruned").exists()


def test_a_streamed_layer_is_checked_on_a_few_tokens(tmp_path, monkeypatch):
    """Two samples of eight tokens, whatever the size of a calibration batch."""
    four_layers(tmp_path)
    judge, seen = Recording._judge, []

    def note(self, probe, side, expected, *others):
        if probe.is_layer:
            seen.append((probe.path[-1], side, tuple(expected.shape)))
        judge(self, probe, side, expected, *others)

    monkeypatch.setattr(Recording, "_judge", note)
    stream(tmp_path, "ratio=0.3")
    sides = ("input", "output")
    assert seen == [(str(i), side, (2, 8, 48)) for i in range(4) for side in sides]


def test_layers_that_are_written_are_not_read_ahead(tmp_path, monkeypatch):
    four_layers(tmp_path)
    streamed = Streamed(tmp_path / "dense", CPU, None, False)
    graph = prunekit.trace(streamed.model, example())
    streamed.write_to(tmp_path / "pruned", resume=False)
    layers = streamed.layers(graph)
    layers.enter(1, layers.count)
    layers.leave(1)
    ahead, fetcher = [], Weights.fetcher
    monkeypatch.setattr(
        Weights, "fetcher", lambda self, path: ahead.append(path[-1]) or fetcher(self, path)
    )
    streamed.complete(graph)
    assert ahead == ["2", "3"]


def saved(family, folder):
    """A model whose experts are stored one by one, those of a layer in several files."""
    model = build(family, ONE_BY_ONE[family])
    model.save_pretrained(folder / "dense", max_shard_size="20KB")
    shards = Shards.of_folder(folder / "dense")
    files = {shards[name].file for name in shards if ".layers.0." in name or ".layers.2." in name}
    assert len(files) > 1 and any(".experts.2." in name for name in shards)
    assert not any(name.endswith("experts.gate_up_proj") for name in shards)
    return model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(
            (family, ["ratio=0.3"]) for family in ONE_BY_ONE if family != "glm4_moe"
        ),  # which has one name for two widths
        ("mixtral", ["groups=mlp", "ratio=0.3"]),
        ("qwen3_moe", ["groups=mlp", "policy=uniform"]),  # of all layers alike, the dense one too
        *(
            (family, ["groups=attention", "ratio=0.05"]) for family in ("mixtral", "glm4_moe")
        ),  # experts are only copied
    ],
)
def test_experts_stored_one_by_one(family, options, tmp_path):
    model = saved(family, tmp_path)
    whole = assert_equals_whole(tmp_path, *options)
    assert sum(p.numel() for p in whole.parameters()) < 0.96 * sum(
        p.numel() for p in model.parameters()
    )


def test_experts_of_a_broken_run(tmp_path, monkeypatch):
    saved("qwen3_moe", tmp_path)
    write = LayerWriter.write

    def breaks(self, key, tensors):
        if key.endswith("layers.1"):
            raise KeyboardInterrupt
        write(self, key, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerWriter, "write", breaks)
        stream(tmp_path, "ratio=0.3")
    assert (tmp_path / "state").exists() and not (tmp_path / "pruned").exists()
    assert_equals_whole(tmp_path, "ratio=0.3", "resume=true")


PATIENCE = 20  # seconds that a thread waits for another one where the test is to fail


class Rendezvous(dict):
    """Events by name, made where they are asked for."""

    def __missing__(self, name):
        return self.setdefault(name, threading.Event())

    def meet(self, name):
        assert self[name].wait(PATIENCE), f"{name} never came"


def four_layers(folder):
    tiny_llama(layers=4).save_pretrained(folder / "dense")


def number_in(names):
    """The layer that tensors belong to."""
    (number,) = {int(name.split(".")[2]) for name in names}
    return number


def test_the_next_layer_is_read_while_one_is_worked_on(tmp_path, monkeypatch):
    four_layers(tmp_path)
    events, ahead = Rendezvous(), []
    fetcher, leave = Weights.fetcher, StreamedLayers.leave

    def slow_fetcher(self, path):
        fetch, number = fetcher(self, path), int(path.rsplit(".", 1)[1])

        def wait_and_fetch():
            ahead.append(number)
            events[f"reading {number}"].set()
            if number:
                events.meet(f"leaving {number - 1}")  # so that reading goes on beside the work
            return fetch()

        return wait_and_fetch

    def watched_leave(self, layer):
        if layer < 3:
            events.meet(f"reading {layer + 1}")  # reading has begun before this layer is left
            assert ahead[-1] == layer + 1  # one layer ahead and no more
        events[f"leaving {layer}"].set()
        leave(self, layer)

    monkeypatch.setattr(Weights, "fetcher", slow_fetcher)
    monkeypatch.setattr(StreamedLayers, "leave", watched_leave)
    assert_equals_whole(tmp_path, "ratio=0.3")
    assert ahead == [0, 1, 2, 3]


def test_the_last_layer_is_written_while_the_next_is_worked_on(tmp_path, monkeypatch):
    four_layers(tmp_path)
    events, behind = Rendezvous(), []
    write, gather, remove = LayerWriter.write, LayerWriter.gather, StreamedLayers.remove

    def slow_write(self, key, tensors):
        number = int(key.rsplit(".", 1)[1]) if ".layers." in key else None
        if number in (0, 1, 2):
            events.meet(f"working on {number + 1}")
        write(self, key, tensors)
        if number is not None:
            behind.append(("written", number))

    def watched_gather(self, tensors):
        if threading.current_thread() is threading.main_thread() and len(tensors) > 1:
            behind.append(("held", number_in(tensors)))
        return gather(self, tensors)

    def watched_remove(self, group, units):
        events[f"working on {group.layer}"].set()
        remove(self, group, units)

    monkeypatch.setattr(LayerWriter, "write", slow_write)
    monkeypatch.setattr(LayerWriter, "gather", watched_gather)
    monkeypatch.setattr(StreamedLayers, "remove", watched_remove)
    assert_equals_whole(tmp_path, "ratio=0.3")
    assert behind == [(what, i) for i in range(4) for what in ("held", "written")]  # one at most


def test_a_layer_that_cannot_be_read_ahead_is_named(tmp_path):
    four_layers(tmp_path)
    name = "model.layers.2.mlp.up_proj.weight"
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[7] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"{name}: the weights hold NaN"):
        stream(tmp_path, "ratio=0.3")
    assert threads() == []
    assert sorted(path.name for path in (tmp_path / ".pruned.partial").iterdir()) == [
        "model.layers.0.safetensors",
        "model.layers.1.safetensors",
    ]


def test_a_layer_that_cannot_be_written_behind_is_written_by_the_next_run(tmp_path, monkeypatch):
    four_layers(tmp_path)
    save = safetensors.torch.save_file

    def fills(tensors, file, metadata=None):
        if "model.layers.1" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file, metadata)

    match = f"{tmp_path / 'pruned'}: can't be written: .*No space left on device"
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=match):
        patch.setattr(safetensors.torch, "save_file", fills)
        stream(tmp_path, "ratio=0.3")
    assert threads() == [] and not (tmp_path / "pruned").exists()
    assert_equals_whole(tmp_path, "ratio=0.3", "resume=true")


def test_an_interrupt_waits_until_the_last_layer_is_whole(tmp_path, monkeypatch):
    four_layers(tmp_path)
    failing, write, remove = threading.Event(), LayerWriter.write, StreamedLayers.remove

    def slow_write(self, key, tensors):
        if key.endswith("layers.1"):
            assert failing.wait(PATIENCE)
            time.sleep(0.2)  # long enough to see whether somebody waits
        write(self, key, tensors)

    def interrupted(self, group, units):
        if group.layer == 2:
            failing.set()
            raise KeyboardInterrupt
        remove(self, group, units)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LayerWriter, "write", slow_write)
        patch.setattr(StreamedLayers, "remove", interrupted)
        stream(tmp_path, "ratio=0.3")
    partial = tmp_path / ".pruned.partial"
    assert {path.name for path in partial.iterdir()} == {
        f"model.layers.{i}.safetensors" for i in (0, 1)
    }
    assert threads() == []
    assert_equals_whole(tmp_path, "ratio=0.3", "resume=true")


def threads():
    """The threads of reading and writing that still run."""
    return [one.name for one in threading.enumerate() if one.name.startswith("prunekit-")]
