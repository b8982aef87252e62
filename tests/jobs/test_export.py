"""`task=export`, what `export` asks of a run, and the model card."""

import json

import huggingface_hub
import pytest
import torch
import yaml
from conftest import command_line, token_ids
from processes import run_python
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import prunekit
from prunekit.checkpoint import load_tokenizer
from prunekit.demo import DEMO_MODEL
from prunekit.report import Report, model_card

QUICK = [
    "data.calibration.samples=8",
    "eval.max_tokens=512",
    "eval.speed=false",
    "eval.prompts=[]",
    "ratio=0.3",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    finished = command_line(*QUICK, "method=magnitude", "output_dir=out", cwd=place)
    assert finished.returncode == 0, finished.stderr
    return place


@pytest.fixture
def hub(monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(folder_path)
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return calls


def test_the_card(run):
    text = (run / "out/model/README.md").read_text()
    _, head, body = text.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["library_name"] == "transformers"
    assert {"prunekit", "magnitude"} <= set(facts["tags"])
    assert "30.00% of all parameters" in body
    assert "8 sequences of 128 tokens of 8 documents of embedded, seed 0" in body
    assert "prunekit.register_with_transformers()" in body
    report = {
        "task": "prune",
        "models": ["dense", "pruned"],
        "perplexity": {},
        "parameters": {},
        "weight_bytes": {},
        "seed": 0,
        "versions": {},
        "method": "slimgpt",
        "base": "org/name",
        "command": "python -m prunekit model.path=/home/someone/secret/model data=c4",
    }
    card = model_card(Report.from_plain(report), "stock")
    assert "base_model: org/name" in card
    assert "model.path=model data=c4" in card
    assert "someone" not in card
    assert "vLLM" not in card
    layer = {"index": 0, "attention": {"kept": 0, "total": 4}, "mlp": {"kept": 3, "total": 9}}
    card = model_card(Report.from_plain(report | {"layers": [layer]}), "remote")
    assert "1 layer without attention or without FFN" in card


def test_the_code_goes_along_and_loads_where_we_are_not(run):
    finished = command_line(
        "task=export", "export.remote_code=true", "model.path=out", "output_dir=remote", cwd=run
    )
    assert finished.returncode == 0, finished.stderr
    assert "trust_remote_code=True" in (run / "remote/model/README.md").read_text()
    program = """
import sys
sys.modules["prunekit"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(
    "remote/model", trust_remote_code=True, dtype=torch.float32
)
torch.save(model(input_ids=torch.load("ids.pt")).logits, "logits.pt")
"""
    torch.save(token_ids(), run / "ids.pt")
    done = run_python(program, cwd=run)
    assert done.returncode == 0, done.stderr
    expected = prunekit.from_pretrained(run / "out/model", dtype=torch.float32)(
        input_ids=token_ids()
    ).logits
    assert torch.equal(torch.load(run / "logits.pt"), expected)


def test_one_run_prunes_exports_and_pushes(tmp_path, hub):
    finished = command_line(
        *QUICK,
        "method=magnitude",
        "shapes=uniform",
        "export=gguf",
        "export.dtype=bf16",
        "export.push_to_hub=me/small",
        "export.private=false",
        "output_dir=out",
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "out/model-bf16.gguf").stat().st_size > 8e6
    assert hub[0] == ("me/small", False)
    assert hub[1].endswith("out/model")
    assert "loads this folder" in (tmp_path / "out/model/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert len({layer.mlp.up_proj.out_features for layer in model.model.layers}) == 1


def test_a_finished_model_is_pushed_as_it_is(run, hub):
    finished = command_line(
        "task=export", "model.path=out", "export.push_to_hub=me/small", "output_dir=pushed", cwd=run
    )
    assert finished.returncode == 0, finished.stderr
    assert hub == [("me/small", True), "out/model"]
    assert "pushed to https://huggingface.co/me/small" in finished.stdout + finished.stderr
    assert not (run / "pushed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "task=export: expected export=gguf"),
        (["export=gguf", "export.dtype=q4"], "export.dtype: 'q4' is unknown"),
        (["export.remote_code=maybe"], "export.remote_code: expected true or false, got 'maybe'"),
        (
            ["export.remote_code=true", "export.tensor_parallel=0"],
            "export.tensor_parallel: expected a whole number ≥ 1, got 0",
        ),
        (
            ["export.remote_code=true", "export.tensor_parallel=64"],
            "export.tensor_parallel=64: expected at least 64, got",
        ),
        (["export=gguff"], "export: unknown choice 'gguff': did you mean gguf"),
        (["export.push_to_hub=me/small"], "export.push_to_hub: me/small: no way"),
        (
            ["export.push_to_hub=true"],
            "export.push_to_hub: expected a repository's name, user/name, got True",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run, options, message, monkeypatch):
    class Hub:
        def create_repo(self, *_, **__):
            raise OSError("no way\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    finished = command_line("task=export", "model.path=out", *options, "output_dir=wrong", cwd=run)
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert message in line
    assert not (run / "wrong").exists()


def test_devices_can_share_the_layers_of_a_run(tmp_path):
    options = [*QUICK, "method=magnitude", "shapes=free", "output_dir=out"]
    done = command_line(*options, "export.tensor_parallel=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    layers = [config | own for own in config["per_layer_config"].values()]
    sizes = {name: {layer[name] for layer in layers} for name in names}
    assert min(len(each) for each in sizes.values()) > 1
    assert not any(size % 2 for each in sizes.values() for size in each)
    early = command_line(*QUICK, "export.tensor_parallel=16", "output_dir=early", cwd=tmp_path)
    assert early.returncode == 2
    assert "expected at least 16, got" in early.stderr
    assert not (tmp_path / "early").exists()
    options = ["task=export", "model.path=out", "export.remote_code=true"]
    for devices, status in ((2, 0), (16, 2)):
        asked = [f"export.tensor_parallel={devices}", f"output_dir=for-{devices}"]
        assert command_line(*options, *asked, cwd=tmp_path).returncode == status
        assert (tmp_path / f"for-{devices}").exists() == (not status)


def test_the_unfinished_file_of_a_killed_export_is_not_in_the_way(run):
    (run / "killed").mkdir()
    (run / "killed/.model-f16.gguf.tmp").write_text("half")
    finished = command_line(
        "task=export", "model.path=out", "export=gguf", "output_dir=killed", cwd=run
    )
    assert finished.returncode == 0, finished.stderr
    assert [path.name for path in (run / "killed").iterdir()] == ["model-f16.gguf"]


def test_a_family_that_a_format_lacks_is_refused_before_pruning(tmp_path):
    config = GPT2Config(vocab_size=2048, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    prunekit.save_pretrained(GPT2LMHeadModel(config), tmp_path / "gpt2", load_tokenizer(DEMO_MODEL))
    finished = command_line(
        *QUICK, "model.path=gpt2", "export=gguf", "output_dir=out", cwd=tmp_path
    )
    assert finished.returncode == 2
    assert (
        "export=gguf writes llama, mistral, qwen2, qwen3 models, got gpt2"
        in finished.stderr.splitlines()[-1]
    )
    assert not (tmp_path / "out").exists()
    finished = command_line("task=evaluate", "export=gguf", "output_dir=out", cwd=tmp_path)
    assert "task=evaluate: writes no model that could be exported" in finished.stderr


def test_what_fails_after_the_run_leaves_the_run(tmp_path, monkeypatch):
    from prunekit.errors import ExportError
    from prunekit.exports.gguf.writer import Gguf

    def refuse(*_):
        raise ExportError("llama.cpp can't")

    monkeypatch.setattr(Gguf, "write", refuse)
    finished = command_line(
        *QUICK, "method=magnitude", "export=gguf", "output_dir=out", cwd=tmp_path
    )
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].endswith(
        f"llama.cpp can't; the model itself is finished: {tmp_path / 'out/model'}"
    )
    assert (tmp_path / "out/report.json").exists()
    prunekit.from_pretrained(tmp_path / "out/model")
