"""The embedded model: small, trained, prunable in the papers' order; its training resumes bit for
bit.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import prunekit
from prunekit.checkpoint import load_tokenizer
from prunekit.data.corpora import load_corpus
from prunekit.data.tokens import calibration_windows, evaluation_windows
from prunekit.demo import DEMO_MODEL
from prunekit.demo import train as training
from prunekit.evaluation.perplexity import perplexity


def test_it_is_small_and_says_what_it_is():
    files = [
        path
        for path in DEMO_MODEL.parent.rglob("*")
        if path.is_file() and "training" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files) < 15e6
    card = json.loads((DEMO_MODEL.parent / "card.json").read_text())
    assert card["perplexity"] < card["bigram"] / 3 < card["unigram"]
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_hidden_layers"] >= 8
    assert config["num_attention_heads"] >= 8


@pytest.fixture(scope="module")
def material():
    model, tokenizer = (
        prunekit.from_pretrained(DEMO_MODEL, dtype=torch.float32),
        load_tokenizer(DEMO_MODEL),
    )
    calibration = calibration_windows(
        load_corpus("embedded", "calibration", {}), tokenizer, 64, 128, 0
    )
    windows = evaluation_windows(
        load_corpus("embedded", "eval", {}), tokenizer, 128, 8192, "embedded"
    )
    return model, calibration, windows


@pytest.mark.parametrize(("ratio", "samples"), [(0.2, 64), (0.5, 32)])
def test_pruning_it_shows_what_the_papers_show(material, ratio, samples):
    """LLM-Pruner has its paper's ten samples."""
    dense, calibration, windows = material
    windows = windows[:samples]
    found = {}
    for method, count in (("slimgpt", samples), ("llm_pruner", 10), ("random", 1)):
        model = copy.deepcopy(dense)
        prunekit.prune(model, ratio=ratio, method=method, calibration=calibration[:count])
        found[method] = perplexity(model, windows)
    assert found["slimgpt"] < found["llm_pruner"] < found["random"]
    if ratio == 0.2:
        assert found["slimgpt"] < 1.1 * perplexity(dense, windows)


def test_training_resumes_where_it_was_killed(tmp_path, monkeypatch):
    documents = {
        "train": [("a", "def f(x):\n    return x + 1\n" * 60)],
        "heldout": [("b", "def g(y):\n    pass\n" * 60)],
    }
    monkeypatch.setattr(training.embedded, "documents", lambda split: documents[split])
    config = training.TrainingConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=24,
        layers=1,
        heads=2,
        steps=4,
        batch_size=2,
        sequence_length=16,
        warmup_steps=1,
    )
    training.train(config, tmp_path / "whole", "cpu", every=2)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        real, calls = training.heldout_loss, []

        def first_time_only(*args):
            calls.append(1)
            return real(*args) if len(calls) == 1 else killed()

        patch.setattr(training, "heldout_loss", first_time_only)
        with pytest.raises(KeyboardInterrupt):
            training.train(config, tmp_path / "broken", "cpu", every=2)
    training.train(config, tmp_path / "broken", "cpu", every=2)
    whole, resumed = (
        load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "broken")
    )
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    with pytest.raises(SystemExit, match="belongs to another configuration"):
        training.train(
            training.TrainingConfig(steps=9, vocab_size=280), tmp_path / "broken", "cpu", every=2
        )
