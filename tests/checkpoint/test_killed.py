"""A process killed in the middle of saving leaves no folder, or the one that was there; the next
one just works.
"""

import pytest
import torch
from conftest import tiny_llama, token_ids
from processes import run_python

import prunekit
from prunekit.checkpoint import LayerWriter, Weights, open_streamed

PATCH = """
import os, signal, sys
import importlib

def dies(where, after):
    module, _, name = where.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ImportError:
        module, _, cls = module.rpartition(".")
        owner = getattr(importlib.import_module(module), cls)
    real = getattr(owner, name)
    def call(*args, **kwargs):
        if after:
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, call)
"""
SAVE = """
import prunekit
model = prunekit.from_pretrained("dense")
for where in sys.argv[1:]:
    if not (child := os.fork()):
        point, _, after = where.partition(":")
        dies(point, bool(after))
        prunekit.save_pretrained(model, f"out-{where}")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, where
"""
POINTS = [
    "transformers.modeling_utils.safe_save_file",
    "transformers.modeling_utils.safe_save_file:after",
    "prunekit.checkpoint.save.describe",
    "prunekit.checkpoint.save.check_loadable",
    "prunekit.checkpoint.save.write_manifest",
    "prunekit.checkpoint.save.write_manifest:after",
    "prunekit.runtime.files.publish",
    "pathlib.Path.chmod",
    "pathlib.Path.replace",
    "pathlib.Path.rmdir:after",
]
STREAM = """
from prunekit.checkpoint import LayerWriter, Weights, open_streamed
for where in sys.argv[1:]:
    if not (child := os.fork()):
        point, _, after = where.partition(":")
        model, shards = open_streamed("dense")
        weights, writer = Weights(model, shards), LayerWriter(f"out-{where}")
        writer.copy(shards, weights.outside_names("model.layers"))
        dies(point, bool(after))
        for i in range(len(model.model.layers)):
            with weights.enter(f"model.layers.{i}"):
                writer.write(f"model.layers.{i}", weights.state(f"model.layers.{i}"))
        writer.finish(model)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, where
"""
STREAMED_POINTS = [
    "safetensors.torch.save_file:after",
    "pathlib.Path.replace:after",
    "prunekit.checkpoint.writer.write_text",
    "prunekit.checkpoint.writer.publish",
]


def killed(code, points, place):
    prunekit.save_pretrained(tiny_llama(layers=2), place / "dense")
    for where in points:
        if where.endswith("rmdir:after"):
            (place / f"out-{where}").mkdir()
    done = run_python(PATCH + code, *points, cwd=place)
    assert not done.returncode, done.stderr[-2000:]
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith(".")) == [
        "dense"
    ]
    return prunekit.from_pretrained(place / "dense")


def test_killed_while_saving(tmp_path):
    model = killed(SAVE, POINTS, tmp_path)
    ids = token_ids()
    for where in POINTS:
        target = tmp_path / f"out-{where}"
        prunekit.save_pretrained(model, target)
        assert torch.equal(
            prunekit.from_pretrained(target)(input_ids=ids).logits, model(input_ids=ids).logits
        )


def test_killed_while_saving_layer_by_layer(tmp_path):
    whole = killed(STREAM, STREAMED_POINTS, tmp_path)
    ids = token_ids()
    for where in STREAMED_POINTS:
        model, shards = open_streamed(tmp_path / "dense")
        weights, writer = (
            Weights(model, shards),
            LayerWriter(tmp_path / f"out-{where}", resume=True),
        )
        for i in range(2):
            with weights.enter(f"model.layers.{i}"):
                if not writer.has(f"model.layers.{i}"):
                    writer.write(f"model.layers.{i}", weights.state(f"model.layers.{i}"))
        writer.copy(shards, weights.outside_names("model.layers"))
        writer.finish(model)
        again = prunekit.from_pretrained(tmp_path / f"out-{where}")
        assert torch.equal(again(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_old_folder_stays_whole(tmp_path):
    model = tiny_llama(layers=1)
    prunekit.save_pretrained(model, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(prunekit.PrunekitError, match="expected a new or empty folder"):
        prunekit.save_pretrained(tiny_llama(layers=1, seed=1), tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
