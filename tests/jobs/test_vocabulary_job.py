"""`groups=vocabulary`: the job, its report, and what can't go with it."""

import pytest
import torch
from conftest import command_line
from report_schema import read_report
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit
from prunekit.errors import ConfigError, DataError

TEXT = "\n\n".join(f"Once upon a time there were {n} little numbers." for n in range(200))
SMALL = [
    "data.calibration.samples=8",
    "data.calibration.sequence_length=32",
    "data.calibration.path=text.txt",
    "eval.corpora=[text.txt,embedded]",
    "eval.window=32",
    "eval.max_tokens=256",
    "eval.prompts=[]",
    "eval.speed=false",
    "eval.layer_tokens=64",
]


@pytest.fixture(scope="module")
def run(short_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "text.txt").write_text(TEXT)
    asked = ["groups=[vocabulary,mlp]", "ratio=0.1", "policy=uniform", "output_dir=both"]
    done = command_line(*SMALL, f"model.path={short_model}", *asked, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_tokens_go_first_and_the_ratio_is_a_share_of_what_is_left(run, short_model):
    report = read_report(run / "both")
    dense = AutoModelForCausalLM.from_pretrained(short_model)
    pruned = prunekit.from_pretrained(run / "both" / "model")
    rows = pruned.get_input_embeddings().num_embeddings
    assert report["vocabulary"]["tokens"] == {"dense": 2048, "pruned": rows}
    assert rows % 64 == 0
    assert rows == pruned.config.vocab_size < 1000
    ends = 1 if dense.config.tie_word_embeddings else 2
    left = dense.num_parameters() - ends * (2048 - rows) * dense.config.hidden_size
    assert 1 - pruned.num_parameters() / left == pytest.approx(report["ratio"]["achieved"])
    assert report["ratio"]["achieved"] == pytest.approx(0.1, abs=0.01)
    assert report["parameters"] == {
        "dense": dense.num_parameters(),
        "pruned": pruned.num_parameters(),
    }


def test_the_folder_holds_the_tokenizer_of_the_model(run, short_model):
    before = AutoTokenizer.from_pretrained(short_model)
    after = AutoTokenizer.from_pretrained(run / "both" / "model")
    assert len(after) == prunekit.from_pretrained(run / "both" / "model").config.vocab_size
    tokens = [own.convert_ids_to_tokens(own(TEXT)["input_ids"]) for own in (before, after)]
    assert tokens[0] == tokens[1]


def test_figures_that_do_not_compare_are_told_or_left_out(run):
    report = read_report(run / "both")
    (told,) = [line for line in report["warnings"] if "splits some of its words" in line]
    assert told.startswith("embedded: ")  # all words of text.txt are whole
    assert "layer_error" in report


def test_vocabulary_alone_and_from_python(run, short_model):
    report = prunekit.prune_checkpoint(
        short_model,
        run / "alone",
        overrides=["groups=vocabulary", f"vocabulary.corpora={run / 'text.txt'}"]
        + [line for line in SMALL if line.startswith("eval") and "corpora" not in line]
        + ["eval.corpora=[embedded]"],
    )
    assert "ratio" not in report
    assert not (run / "alone" / "plan.json").exists()
    dense = AutoModelForCausalLM.from_pretrained(short_model)
    tokenizer = AutoTokenizer.from_pretrained(short_model)
    smaller = prunekit.prune_vocabulary(dense, tokenizer, [TEXT])
    loaded = AutoModelForCausalLM.from_pretrained(run / "alone" / "model")
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, smaller.model.state_dict()[name]), name
    assert len(smaller.kept) == report["vocabulary"]["tokens"]["pruned"]


def test_what_it_can_not_go_with(short_model):
    with pytest.raises(ConfigError, match=r"prunekit.prune_vocabulary\(model, tokenizer, texts\)"):
        model = AutoModelForCausalLM.from_pretrained(short_model)
        ids = torch.arange(64).view(2, 32)
        prunekit.prune(model, calibration=ids, overrides=["groups=vocabulary"])
    with pytest.raises(DataError, match="expected documents that tell which tokens are needed"):
        prunekit.prune_vocabulary(model, None, [" "])
    with pytest.raises(DataError, match="expected a list of texts, got str"):
        prunekit.prune_vocabulary(model, None, "one text, whose letters are no texts")
    with pytest.raises(DataError, match="expected texts of type str, got bytes"):
        prunekit.prune_vocabulary(model, None, ["a", b"b"])
    with pytest.raises(DataError, match="expected one of transformers, got NoneType"):
        prunekit.prune_vocabulary(model, None, ["a"])
    tokenizer = AutoTokenizer.from_pretrained(short_model)
    tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    with pytest.raises(
        DataError, match=r"expected at most the \d+ tokens of the model's embedding"
    ):
        prunekit.prune_vocabulary(model, tokenizer, ["a"])
    for asked, told in (
        ("recovery=distill", "the dense model, its teacher"),
        ("memory.stream=true", "can't go with groups=vocabulary"),
    ):
        with pytest.raises(ConfigError, match=told):
            prunekit.prune_checkpoint(
                short_model, "nowhere", overrides=["groups=vocabulary", asked]
            )
