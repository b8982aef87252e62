"""Damaged folders and plans: a model that works or one line that says what is wrong, soon and
without much memory.
"""

import hashlib
import json
import shutil
import struct
from contextlib import contextmanager

import pytest
import torch
from conftest import tiny_llama, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.checkpoint import load_tokenizer, offloaded, open_streamed
from prunekit.errors import CheckpointError, PrunekitError, TraceError

FEW = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
IDS = token_ids(1, 5)
INDEX = "model.safetensors.index.json"
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "num_labels",
)
NESTED = (
    "per_layer_config",
    "pruned_sizes",
    "extra_biases",
    "dense_sizes",
    "auto_map",
    "architectures",
    "model_type",
    "rope_parameters",
    "dtype",
    "quantization_config",
    "text_config",
    "layer_types",
)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 200),
    st.sampled_from([10**5, 10**7, 10**9, 2**63, 10**30, -(10**9)]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["llama", "float16", "LlamaForCausalLM", "x.y", "../x"]),
    st.recursive(
        st.integers() | st.text(max_size=3) | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("0123abc", max_size=2), inner, max_size=3)
        ),
        max_leaves=5,
    ),
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A pruned folder, in one file and in several; a dense one."""
    place = tmp_path_factory.mktemp("bases")
    model = tiny_llama(layers=2)
    prunekit.save_pretrained(model, place / "dense")
    prunekit.prune(model, ratio=0.3, method="magnitude", calibration=token_ids(4, 12))
    prunekit.save_pretrained(model, place / "pruned")
    shutil.copytree(place / "pruned", place / "sharded")
    split(place / "sharded")
    rewrite(place / "sharded")
    return place


def split(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file(
            {n: t for n, t in tensors.items() if places[n] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def rewrite(folder):
    """A manifest that agrees with whatever is there."""
    sums = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.iterdir()
        if p.name != "prunekit.json"
    }
    (folder / "prunekit.json").write_text(json.dumps({"format": 1, "sha256": sums}))


def copied(bases, name):
    """A copy to damage, the weights hard links."""
    copy = bases / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bases / name, copy)
    return copy


def loaded(folder, streamed):
    if not streamed:
        return run(prunekit.from_pretrained(folder))
    model, shards = open_streamed(folder)
    with offloaded(model, shards):
        return run(model)


def run(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@contextmanager
def little_work():
    """Whatever a folder claims, not many modules are built for it: that is where time would go.

    The dense model has some thirty; a configuration may ask for two hundred layers.
    """
    most, built, init = 10_000, [], nn.Module.__init__

    def count(self, *arguments, **more):
        built.append(type(self))
        if len(built) > most:
            raise MemoryError("this would go on and on")
        init(self, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__init__", count)
        yield
    assert len(built) <= most, built[-1]


def survives(folder, streamed=False):
    """Whether a folder is loaded and runs; else one line says why."""
    with little_work():
        try:
            logits = loaded(folder, streamed)
        except PrunekitError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            return False
    assert logits.shape[:2] == IDS.shape
    return True


def changed(config, draw):
    """A config with one thing damaged, at any depth."""
    name = draw(st.sampled_from([*SIZES, *NESTED, *config]))
    if isinstance(config.get(name), dict) and draw(st.booleans()):
        return config | {name: changed(config[name], draw)} if config[name] else config
    how = draw(st.sampled_from(["drop", "set", "set", "set"]))
    return (
        {k: v for k, v in config.items() if k != name}
        if how == "drop"
        else config | {name: draw(JUNK)}
    )


@FEW
@given(
    data=st.data(),
    base=st.sampled_from(["pruned", "dense"]),
    streamed=st.booleans(),
    manifest=st.booleans(),
)
def test_a_config_that_says_something_else(bases, data, base, streamed, manifest):
    folder = copied(bases, base)
    config = changed(json.loads((folder / "config.json").read_text()), data.draw)
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder) if manifest else (folder / "prunekit.json").unlink()
    survives(folder, streamed)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("base", ["pruned", "dense"])
@pytest.mark.parametrize(
    "values",
    [
        *({name: value} for name in SIZES for value in (10**9, 10**30, -7, None)),
        *({"layer_types": ["full_attention"] * n} for n in (0, 1, 10**5)),
        {"num_hidden_layers": 1e9},
        {"num_hidden_layers": float("inf")},
        {"num_hidden_layers": 10**7},
        {"text_config": {"num_hidden_layers": 10**8}},
        {"head_dim": 74},
        {"auto_map": [3]},
        {"model_type": ["llama"]},
        {"model_type": "gpt2", "n_positions": 10**6},
        {"model_type": "gptj", "n_positions": 10**9},
        {"attn_implementation": "someone/kernel"},
        {"extra_biases": ["nowhere"]},
        {"dense_sizes": {"x": 1}},
    ],
    ids=lambda values: "-".join(f"{name}-{value!s:.9}" for name, value in values.items()),
)
def test_sizes_out_of_all_proportion(bases, base, values, streamed):
    folder = copied(bases, base)
    (folder / "prunekit.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    fits = survives(folder, streamed)
    harmless = {
        "max_position_embeddings",
        "num_labels",
        "text_config",
        "extra_biases",
        "dense_sizes",
        "auto_map",
        "layer_types",
    }
    allowed = None in values.values() or not harmless.isdisjoint(values)
    assert not fits or allowed


FILES = [
    "config.json",
    "generation_config.json",
    "prunekit.json",
    INDEX,
    "model.safetensors",
    "model-0.safetensors",
]


@FEW
@given(
    data=st.data(),
    file=st.sampled_from(FILES),
    streamed=st.booleans(),
    manifest=st.sampled_from(["", "new", "old"]),
)
def test_bytes_that_flipped(bases, data, file, streamed, manifest):
    folder = copied(bases, "sharded" if (bases / "sharded" / file).exists() else "pruned")
    before = (folder / file).read_bytes()
    position = data.draw(st.integers(0, min(len(before), 3000) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "nest"]))
    after = {
        "flip": before[:position]
        + bytes([before[position] ^ data.draw(st.integers(1, 255))])
        + before[position + 1 :],
        "cut": before[:position],
        "insert": before[:position]
        + data.draw(st.binary(min_size=1, max_size=9))
        + before[position:],
        "nest": b"[" * 50_000,
    }[how]
    (folder / file).write_bytes(after)
    if file != "prunekit.json" and manifest != "old":
        rewrite(folder) if manifest else (folder / "prunekit.json").unlink()
    assert not (survives(folder, streamed) and manifest == "old" and file != "prunekit.json")


def header(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@FEW
@given(data=st.data(), base=st.sampled_from(["pruned", "dense"]), streamed=st.booleans())
def test_a_header_that_says_something_else(bases, data, base, streamed):
    folder = copied(bases, base)
    (folder / "prunekit.json").unlink()
    path = folder / "model.safetensors"
    entries, rest = header(path.read_bytes())
    name = data.draw(st.sampled_from(sorted(entries)))
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "all", "reversed"]))
    if key == "name":
        entries[data.draw(st.text(max_size=9))] = entries.pop(name)
    elif key == "reversed" and "shape" in entries[name]:
        entries[name]["shape"] = entries[name]["shape"][::-1]
    elif key == "all":
        entries[name] = data.draw(JUNK)
    else:
        dtypes = st.sampled_from(["I32", "U32", "F16", "F8_E4M3", "BOOL", "C64", "F4"])
        numbers = st.lists(st.sampled_from([0, 1, 4, 48, 10**9, 2**62, -1]), max_size=4)
        entries[name][key] = data.draw(st.one_of(JUNK, dtypes, numbers))
    text = json.dumps(entries).encode()
    length = data.draw(
        st.sampled_from([len(text), len(text), len(text), 0, 7, len(text) + 1, 2**40, 2**64 - 1])
    )
    path.write_bytes(struct.pack("<Q", length) + text + rest)
    survives(folder, streamed)


@FEW
@given(data=st.data())
def test_a_plan_that_says_something_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "plan.json"
    plan = prunekit.PruningPlan({"layers.0.mlp": [0, 3], "layers.1.mlp": [2]}, "0123")
    content = json.loads(plan.to_json())
    how = data.draw(st.sampled_from(["units", "key", "bytes"]))
    if how == "units":
        content["removed"]["layers.0.mlp"] = data.draw(st.lists(JUNK, max_size=3) | JUNK)
    elif how == "key":
        content[data.draw(st.sampled_from(["format", "fingerprint", "removed"]))] = data.draw(JUNK)
    text = json.dumps(content).encode()
    cut = data.draw(st.integers(0, len(text)))
    path.write_bytes(
        text[:cut] + data.draw(st.binary(max_size=3)) + text[cut:] if how == "bytes" else text
    )
    try:
        found = prunekit.PruningPlan.load(path)
    except TraceError as error:
        assert "\n" not in str(error)
    else:
        assert all(
            type(unit) is int and unit >= 0 for units in found.removed.values() for unit in units
        )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            '{"format": 2, "removed": {}, "fingerprint": null}',
            "expected format 1, got 2: made by another version",
        ),
        ('{"format": 1, "removed": {"a": [1.5]}, "fingerprint": null}', "removed: expected"),
        ('{"format": 1, "removed": {"a": [-1]}, "fingerprint": null}', "removed: expected"),
        ('{"format": 1, "removed": {"a": [2, 2]}, "fingerprint": null}', "removes a unit twice"),
        ('{"format": 1, "removed": {}, "fingerprint": 3}', "fingerprint: expected a text, got 3"),
        ('{"format": 1, "removed": {}}', "expected removed and fingerprint"),
        ("[" * 50_000, "not a pruning plan"),
        ("", "not a pruning plan"),
    ],
)
def test_plans_are_refused_with_the_reason(tmp_path, text, match):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(TraceError, match=match) as caught:
        prunekit.PruningPlan.load(tmp_path / "plan.json")
    assert "\n" not in str(caught.value) and "plan.json" in str(caught.value)


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("load", [prunekit.from_pretrained, open_streamed])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda f: edited(f / "prunekit.json", lambda m: m.update(format=2)),
            "expected format 1, got 2: made by anoth",
        ),
        (
            lambda f: edited(f / "prunekit.json", lambda m: m["sha256"].clear()),
            "expected the checksums",
        ),
        (
            lambda f: edited(f / "prunekit.json", lambda m: m["sha256"].update({"../x": "0"})),
            r"got '\.\./x'",
        ),
        (
            lambda f: edited(f / "prunekit.json", lambda m: m["sha256"].update({"/x": "0"})),
            "names of files in the fold",
        ),
        (
            lambda f: edited(f / "prunekit.json", lambda m: m["sha256"].pop("model.safetensors")),
            "was added after",
        ),
        (
            lambda f: (f / "more.safetensors").write_bytes(b""),
            "more.safetensors was added after it was saved",
        ),
        (lambda f: (f / "modeling.py").write_text(""), "modeling.py was added after it was saved"),
        (lambda f: (f / INDEX).write_text("{}"), "index.json was added after it was saved"),
        (lambda f: (f / "generation_config.json").unlink(), "generation_config.json is missing"),
        (
            lambda f: (f / "generation_config.json").write_text("{}"),
            "generation_config.json is not as it was saved",
        ),
    ],
)
def test_tampering_is_refused_with_the_reason(bases, load, change, match):
    folder = copied(bases, "pruned")
    change(folder)
    with pytest.raises(CheckpointError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [prunekit.from_pretrained, open_streamed])
@pytest.mark.parametrize("place", ["../dense/model.safetensors", "/etc/passwd", "", "..", 3, None])
def test_an_index_stays_in_its_folder(bases, load, place):
    folder = copied(bases, "sharded")
    edited(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": place}))
    rewrite(folder)
    with pytest.raises(CheckpointError, match="expected names of files in the folder, got"):
        load(folder)


def test_sizes_of_another_version_or_model(bases):
    for record, match in (
        ({"format": 2}, "pruned_sizes: expected format 1, got 2"),
        ({"dense": "0"}, "another dense"),
    ):
        folder = copied(bases, "pruned")
        edited(
            folder / "config.json", lambda config, more=record: config["pruned_sizes"].update(more)
        )
        rewrite(folder)
        with pytest.raises(CheckpointError, match=match):
            prunekit.from_pretrained(folder)


def test_a_damaged_tokenizer_folder(bases):
    folder = copied(bases, "pruned")
    with pytest.raises(CheckpointError, match="can't load the tokenizer"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not as it was saved"):
        load_tokenizer(folder)


def test_large_tables_of_a_healthy_model(tmp_path):
    """What is refused is out of proportion; many positions are not."""
    values = {"vocab_size": 97, "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 4096}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **values)).eval()
    prunekit.save_pretrained(model, tmp_path / "model")
    assert survives(tmp_path / "model") and survives(tmp_path / "model", streamed=True)
