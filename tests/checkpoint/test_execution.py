"""Nothing of a checkpoint is run or unpickled unless it is trusted."""

import json
import os
import pickle
import shutil

import pytest
from conftest import tiny_llama, token_ids
from processes import run_python

import prunekit
from prunekit.checkpoint import load_tokenizer, open_streamed
from prunekit.demo import DEMO_MODEL
from prunekit.errors import CheckpointError, PrunekitError

EVIL = """from pathlib import Path
Path({marker!r}).write_text('it ran')
def generate(*_, **__): pass
"""
CLASSES = """
from transformers import {config}, {model}
class Config({config}):
    model_type = {kind!r}
class Model({model}):
    config_class = Config
"""
ALL = {
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Slow", "evil.Fast"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    place, model = tmp_path_factory.mktemp("bases"), tiny_llama(layers=2)
    tokenizer = load_tokenizer(DEMO_MODEL)
    prunekit.save_pretrained(model, place / "dense", tokenizer)
    prunekit.prune(model, ratio=0.3, method="magnitude", calibration=token_ids(4, 12))
    prunekit.save_pretrained(model, place / "pruned", tokenizer)
    return place


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )


def evil(base, folder, model_type=None):
    """A folder that would write a marker where anything of it is run: code, pickles, a tokenizer's
    code.
    """
    shutil.copytree(base, folder)
    (folder / "prunekit.json").unlink()
    marker = folder / "marker"
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": ALL}
    config["model_type"] = model_type or config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    unknown = {"tokenizer_class": "Fast"} if model_type else {}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | unknown | {"auto_map": ALL})
    )
    code = EVIL.format(marker=str(marker))
    kind = model_type or "llama"
    names = {"config": "LlamaConfig", "model": "LlamaForCausalLM", "kind": kind}
    (folder / "evil.py").write_text(code + CLASSES.format(**names))
    for name in ("generate.py", "custom_generate.py", "__init__.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Boom(marker)))
    return marker


class Boom:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


LOADERS = {
    "whole": prunekit.from_pretrained,
    "streamed": open_streamed,
    "tokenizer": load_tokenizer,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("model_type", [None, "evil_type"])
@pytest.mark.parametrize("base", ["dense", "pruned"])
def test_nothing_is_run(bases, tmp_path, cache, base, model_type, loader):
    marker = evil(bases / base, tmp_path / "model", model_type)
    try:
        LOADERS[loader](tmp_path / "model")
    except PrunekitError as error:
        assert model_type and "\n" not in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("loader", ["whole", "streamed"])
def test_what_is_trusted_is_run(bases, tmp_path, cache, loader):
    """Or the marker would prove nothing."""
    marker = evil(bases / "dense", tmp_path / "model", "evil_type")
    LOADERS[loader](tmp_path / "model", trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("base", ["dense", "pruned"])
def test_a_pickle_is_never_read(bases, tmp_path, cache, base, trusted):
    marker = evil(bases / base, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    for load in (prunekit.from_pretrained, open_streamed):
        with pytest.raises(CheckpointError, match="safetensors"):
            load(tmp_path / "model", trust_remote_code=trusted)
    (tmp_path / "model" / "decoy.safetensors").write_bytes(b"")
    for load in (prunekit.from_pretrained, open_streamed):
        with pytest.raises(CheckpointError, match="safetensors"):
            load(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(pickle.dumps(Boom(marker)))
    for load in (prunekit.from_pretrained, open_streamed):
        with pytest.raises(CheckpointError, match="damaged weights"):
            load(tmp_path / "model")
    if not trusted:
        assert not marker.exists()


def test_attention_that_lies_elsewhere_needs_trust(bases, tmp_path):
    for base in ("dense", "pruned"):
        shutil.copytree(bases / base, tmp_path / base)
        (tmp_path / base / "prunekit.json").unlink()
        config = json.loads((tmp_path / base / "config.json").read_text())
        text = json.dumps(config | {"attn_implementation": "someone/kernel"})
        (tmp_path / base / "config.json").write_text(text)
        for load in (prunekit.from_pretrained, open_streamed, load_tokenizer):
            with pytest.raises(
                CheckpointError, match="is code from elsewhere: needs trust_remote_code"
            ):
                load(tmp_path / base)


REGISTERED = """
import sys, prunekit
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, dynamic_module_utils
dynamic_module_utils.HF_MODULES_CACHE = "modules"
prunekit.register_with_transformers()
for folder in sys.argv[1:]:
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
        auto.from_pretrained(folder)
assert not [name for name in sys.modules if "transformers_modules" in name]
"""


def test_registered_classes_run_nothing(bases, tmp_path):
    markers = [evil(bases / base, tmp_path / base) for base in ("dense", "pruned")]
    done = run_python(REGISTERED, "dense", "pruned", cwd=tmp_path)
    assert not done.returncode, done.stderr[-2000:]
    assert not any(marker.exists() for marker in markers)
