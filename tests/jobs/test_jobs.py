"""Prune, recover, evaluate: the three jobs of the command line on a small model, and what they
share.
"""

import json
import shutil

import pytest
import torch
from conftest import command_line, example, tiny_llama
from processes import COMMAND, run_together
from report_schema import read_report
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import prunekit
from prunekit import config as cfg
from prunekit import jobs
from prunekit.checkpoint import load_tokenizer
from prunekit.config.sections import ModelConfig
from prunekit.demo import DEMO_MODEL
from prunekit.errors import ConfigError, PrunekitError
from prunekit.evaluation import perplexity as perplexities
from prunekit.jobs.finetune import modules_by_kind

TEXT = "\n\n".join(
    f"Once upon a time there were {n} little numbers; {n + 1} came after {n}." for n in range(400)
)
SMALL = [
    "data.calibration.samples=8",
    "data.calibration.sequence_length=32",
    "data.calibration.path=text.txt",
    "eval.corpora=[text.txt]",
    "eval.window=32",
    "eval.max_tokens=512",
    "eval.new_tokens=4",
    "eval.latency.prompt=8",
    "eval.latency.new=2",
    "eval.latency.repeats=1",
    "eval.layer_tokens=64",
]
TRAIN = [
    "recovery.path=text.txt",
    "recovery.length=32",
    "recovery.batch_size=8",
    "recovery.samples=40",
    "recovery.evaluations=2",
    "recovery.learning_rate=1e-2",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a model of 2,048 tokens, random, trained a little so that it has
    something to lose.
    """
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text(TEXT)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        tie_word_embeddings=True,
        intermediate_size=384,
        num_hidden_layers=2,
        head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, tokenizer = LlamaForCausalLM(config), load_tokenizer(DEMO_MODEL)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][: 64 * 32]).view(64, 32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    prunekit.save_pretrained(model, folder / "dense", tokenizer)
    return folder


def done(*arguments, cwd, draws=False):
    finished = command_line(*SMALL, *arguments, cwd=cwd, draws=draws)
    assert finished.returncode == 0, finished.stderr
    out = next(a.partition("=")[2] for a in arguments if a.startswith("output_dir="))
    return read_report(cwd / out), finished.stdout


@pytest.fixture(scope="module")
def recovered(place):
    options = ["model.path=dense", "method=magnitude", "ratio=0.3", "recovery=distill", *TRAIN]
    return done(*options, "output_dir=recovered", cwd=place, draws=True)


def test_prune_and_recover(place, recovered):
    report, printed = recovered
    assert report["models"] == ["dense", "pruned", "recovered"]
    found = report["perplexity"]["text.txt"]
    assert found["dense"] < found["recovered"] < found["pruned"]
    assert (
        report["parameters"]["recovered"]
        == report["parameters"]["pruned"]
        < report["parameters"]["dense"]
    )
    curve = report["recovery"]["curve"]
    assert curve[0]["perplexity"]["text.txt"] == pytest.approx(found["pruned"], rel=1e-5)
    assert curve[-1]["perplexity"]["text.txt"] == pytest.approx(found["recovered"], rel=1e-3)
    assert "recovered" in printed and "python -m prunekit" in report["command"]
    model = prunekit.from_pretrained(place / "recovered" / "model")
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]["recovered"]
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert [row["index"] for row in report["layer_error"]] == [0, 1]
    assert {"dense", "recovered"} <= report["latency"]["decode_tokens_per_second"].keys()
    assert not [path.name for path in (place / "recovered").iterdir() if path.name.startswith(".t")]


def test_evaluate_any_folder_beside_another(place, recovered):
    report, _ = done(
        "task=evaluate",
        "model.path=recovered",
        "eval.baseline=dense",
        "output_dir=evaluated",
        cwd=place,
    )
    assert report["models"] == ["dense", "model"]
    before = recovered[0]["perplexity"]["text.txt"]
    assert report["perplexity"]["text.txt"]["model"] == before["recovered"]
    assert report["perplexity"]["text.txt"]["dense"] == before["dense"]
    assert not (place / "evaluated" / "model").exists()
    alone, _ = done(
        "task=evaluate", "model.path=dense", "output_dir=alone", "eval.stride=8", cwd=place
    )
    assert alone["models"] == ["model"]
    assert alone["perplexity"]["text.txt"]["model"] != before["dense"]


def test_shares_are_searched_alone_and_taken_by_hand(place):
    quick = ["rounds=1", "sweeps=1", "generations=1", "children=2", "seeds=[expected_loss]"]
    search = ["policy=search", *(f"policy.{option}" for option in quick)]
    options = ["model.path=dense", "ratio=0.3"]
    chosen = ["task=search", *options, *search, "output_dir=searched"]
    report, printed = done(*chosen, cwd=place, draws=True)
    assert report["policy"]["search"]["taken"] in ("expected_loss", "round 1")
    assert "shares.csv" in printed
    assert not (place / "searched" / "model").exists()
    assert "## Search" in (place / "searched" / "report.md").read_text()
    by_hand, _ = done(
        *options,
        *("policy=manual", "policy.path=searched/shares.csv", "eval=none", "output_dir=manual"),
        cwd=place,
    )
    assert by_hand["policy"]["shares"] == report["policy"]["shares"]
    assert [row["mlp"] for row in by_hand["layers"]] == [row["mlp"] for row in report["layers"]]
    config = cfg.check(cfg.compose(["task=search", "scope=global"]))
    with pytest.raises(ConfigError, match="task=search: expected scope=local"):
        jobs.run(config, place / "no")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("groups=expert", "groups=expert: .*no prunable group"),
        ("importance=reap", r"scores experts \(groups=expert\), not"),
    ],
)
def test_what_can_not_be_cut_is_told_first(place, monkeypatch, option, message):
    measured = []
    monkeypatch.setattr(jobs.job.Subject, "evaluate_as_loaded", measured.append)
    texts = (f"data.calibration.path={place}/text.txt", "data.calibration.samples=4")
    options = [f"model.path={place}/dense", "method=magnitude", option, *texts]
    options += ["data.calibration.sequence_length=32", "eval.window=32"]
    config = cfg.check(cfg.compose(options))
    with pytest.raises(PrunekitError, match=message):
        jobs.run(config, place / "no")
    assert not measured


def test_the_share_of_the_largest_tokens_is_told(place):
    report, printed = done("task=tokens", "model.path=dense", "output_dir=tokens", cwd=place)
    first = report["large_tokens"][0]
    assert first["group"] == "layers.0.self_attn"
    assert 0 < first["permille"] <= first["percent"] < 1
    assert f"{first['percent']:.1%}" in printed
    assert "## Large tokens" in (place / "tokens" / "report.md").read_text()


def test_shares_of_a_model_that_overflows_are_not_searched(place):
    """All of its weights are finite; its outputs are not, and no KL can be taken of them."""
    shutil.copytree(place / "dense", place / "overflowing")
    (place / "overflowing" / "prunekit.json").unlink()  # its digests
    path = place / "overflowing" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e38
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    save_file(weights, path, {"format": "pt"})
    options = ["task=search", "policy=search", "model.path=overflowing", "output_dir=overflowed"]
    finished = command_line(*SMALL, *options, cwd=place)
    assert finished.returncode == 2
    assert "layers.1.mlp.down_proj" in finished.stderr
    assert "is the first to give one" in finished.stderr


def test_recover_later_and_keep_the_adapter(place, recovered):
    from peft import PeftModel

    options = ["recovery=lora", "recovery.merge=false", "recovery.targets=attention", *TRAIN]
    report, _ = done(
        "task=recover", "model.path=recovered", *options, "output_dir=later", cwd=place
    )
    assert report["models"] == ["pruned", "recovered"]
    assert report["layers"] == recovered[0]["layers"]
    assert (place / "later/plan.json").read_text() == (place / "recovered/plan.json").read_text()
    base = prunekit.from_pretrained(place / "later" / "model")
    for name, tensor in prunekit.from_pretrained(place / "recovered/model").state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])
    adapted = PeftModel.from_pretrained(base, place / "later" / "adapter").eval()
    names = {
        name.split(".lora_")[0].rpartition(".")[2]
        for name, _ in adapted.named_parameters()
        if "lora_" in name
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    ids = torch.tensor(load_tokenizer(DEMO_MODEL)(TEXT)["input_ids"][:512]).view(-1, 32)
    assert perplexities.perplexity(adapted, ids) == pytest.approx(
        report["perplexity"]["text.txt"]["recovered"], rel=1e-4
    )


def test_a_sweep_measures_its_dense_model_once(place, monkeypatch):
    from prunekit.evaluation import measures as measure

    measured = []

    def noted(model, *rest):
        measured.append(sum(p.numel() for p in model.parameters()))
        return perplexities.perplexity(model, *rest)

    monkeypatch.setattr(measure, "perplexity", noted)
    dense = sum(p.numel() for p in prunekit.from_pretrained(place / "dense").parameters())

    def runs(name, *more):
        measured.clear()
        chosen = [
            "method=magnitude,random",
            "ratio=0.2",
            "eval=figures",
            "eval.window=32",
            "eval.max_tokens=512",
        ]
        places = ["model.path=dense", "data.calibration.path=text.txt", "eval.corpora=[text.txt]"]
        kept = [f"eval.cache={place / 'cache'}", f"hydra.sweep.dir={name}"]
        length = "data.calibration.sequence_length=32"
        finished = command_line("-m", *chosen, *places, *kept, length, *more, cwd=place)
        assert finished.returncode == 0, finished.stderr
        return len(measured), measured.count(dense)

    assert runs("first") == (3, 1)
    assert runs("again") == (0, 0)
    assert runs("other", "eval.stride=16") == (3, 1)
    text = place / "text.txt"
    text.write_text(TEXT.replace("little", "big"))
    try:
        assert runs("changed", "seed=0") == (3, 1)
    finally:
        text.write_text(TEXT)


FEW = ["method=magnitude", "eval=figures", "eval.window=32", "eval.max_tokens=512"]


@pytest.fixture
def calls(monkeypatch):
    """What runs did with dense models: folders that were loaded, sizes that were measured."""
    from prunekit.evaluation import measures
    from prunekit.jobs import sources

    done = {"loaded": [], "perplexity": [], "macs": [], "samples": [], "outputs": []}

    def note(owner, name, kind, what):
        real = getattr(owner, name)

        def noted(first, *rest, **options):
            done[kind].append(what(first))
            return real(first, *rest, **options)

        monkeypatch.setattr(owner, name, noted)

    size = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    note(sources, "from_pretrained", "loaded", str)
    note(measures, "perplexity", "perplexity", size)
    note(measures, "count_macs", "macs", size)
    note(measures, "continue_prompt", "samples", size)
    note(measures, "layer_outputs", "outputs", size)
    return done


def few(place, *arguments, code=0):
    """Run a sweep, or one run, with few figures over the small model."""
    texts = ["data.calibration.path=text.txt", "eval.corpora=[text.txt]"]
    length = "data.calibration.sequence_length=32"
    done = command_line(*FEW, *texts, length, *arguments, cwd=place)
    assert done.returncode == code, done.stderr


def sweep(place, *arguments, code=0):
    """Run a sweep over the small model; the folders of its runs."""
    folder = place / "sweep"
    shutil.rmtree(folder, ignore_errors=True)
    names = "hydra.sweep.subdir=${hydra.job.num}"
    few(place, *arguments, f"hydra.sweep.dir={folder}", names, "-m", code=code)
    return [path.parent for path in sorted(folder.glob("*/report.json"))]


def test_the_runs_of_a_sweep_load_and_measure_their_dense_model_once(place, calls, tmp_path):
    figures = [
        *("model.path=dense", "eval.macs=8", "eval.layer_tokens=64", "eval.speed=true"),
        *("eval.latency.prompt=8", "eval.latency.new=2", "eval.latency.repeats=1"),
        *("eval.prompts=[Once]", "eval.new_tokens=4", f"eval.cache={tmp_path / 'cache'}"),
    ]
    folders = sweep(place, *figures, "ratio=0.2,0.3")
    reports = [read_report(folder) for folder in folders]
    dense, made = reports[0]["parameters"]["dense"], {k: list(v) for k, v in calls.items()}
    assert made.pop("loaded") == ["dense"]
    for kind, sizes in made.items():
        assert sizes.count(dense) == (len(reports[0]["samples"]) if kind == "samples" else 1), kind
        assert len(set(sizes)) == 3, kind
    figures[-1] = "eval.cache=null"
    for ratio, folder, swept in zip((0.2, 0.3), folders, reports, strict=True):
        few(place, *figures, f"ratio={ratio}", f"output_dir={tmp_path / str(ratio)}")
        alone = read_report(tmp_path / str(ratio))
        measured = ("perplexity", "samples", "layer_error", "macs_by_module", "layers")
        assert {key: swept[key] for key in measured} == {key: alone[key] for key in measured}
        for file in ("plan.json", "model/model.safetensors"):
            assert (folder / file).read_bytes() == (tmp_path / str(ratio) / file).read_bytes()


@pytest.mark.parametrize(
    ("swept", "loads", "measured"),
    [
        ("eval.window=16,32", 1, 2),
        ("eval.corpora=[text.txt],[bigger.txt]", 1, 2),
        ("dtype=float32,bfloat16", 2, 1),  # a CPU computes in float32 either way
        ("model.path=dense,louder", 2, 2),
        ("seed=0,1", 1, 1),
    ],
)
def test_another_model_or_text_is_loaded_and_measured(
    place, calls, tmp_path, swept, loads, measured
):
    (place / "bigger.txt").write_text(TEXT.replace("little", "big"))
    if not (place / "louder").exists():
        model = prunekit.from_pretrained(place / "dense")
        model.lm_head.weight.data.mul_(1.5)
        prunekit.save_pretrained(model, place / "louder", load_tokenizer(place / "dense"))
    path = [] if swept.startswith("model.path") else ["model.path=dense"]
    folders = sweep(place, swept, *path, "ratio=0.2", f"eval.cache={tmp_path}")
    assert len(folders) == 2
    assert len(calls["loaded"]) == loads
    dense = read_report(folders[0])["parameters"]["dense"]
    assert calls["perplexity"].count(dense) == measured


def test_a_folder_that_changes_during_a_sweep_is_loaded_again(place, tmp_path, calls):
    from prunekit.jobs.kept import Kept

    folder, kept = tmp_path / "model", Kept()
    shutil.copytree(place / "dense", folder)
    load = lambda: kept.load(folder, torch.device("cpu"), None, ModelConfig())[0]  # noqa: E731
    first, again = load(), load()
    first.lm_head.weight.data.zero_()
    assert again.lm_head.weight.data.any() and load().lm_head.weight.data.any()
    digest = kept.digest(again)
    kept.figures["a"] = 1
    assert len(calls["loaded"]) == 1
    shutil.rmtree(folder)
    again.lm_head.weight.data.mul_(2)
    prunekit.save_pretrained(again, folder, load_tokenizer(place / "dense"))
    changed = load()
    assert len(calls["loaded"]) == 2 and not kept.figures
    assert torch.equal(changed.lm_head.weight, again.lm_head.weight)
    assert kept.digest(changed) != digest


def test_where_memory_is_short_every_run_loads_its_model(place, calls, monkeypatch):
    from prunekit.jobs import kept

    monkeypatch.setattr(kept, "free_bytes", lambda device: 1000)
    store = kept.Kept()
    one, two = (
        store.load(place / "dense", torch.device("cpu"), None, ModelConfig())[0] for _ in range(2)
    )
    assert len(calls["loaded"]) == 2 and one is not two


def test_a_run_that_fails_leaves_the_model_of_the_sweep(place, calls, monkeypatch, tmp_path):
    from prunekit.jobs import prune

    real, runs = prune.round_weights, []

    def spoil(model, stored):
        real(model, stored)
        runs.append(1)
        if len(runs) == 1:
            for parameter in model.parameters():
                parameter.data.zero_()
            raise PrunekitError("the first run fails")

    monkeypatch.setattr(prune, "round_weights", spoil)
    options = ["model.path=dense", "ratio=0.2,0.3", f"eval.cache={tmp_path}"]
    [left] = sweep(place, *options, code=2)
    assert len(calls["loaded"]) == 1 and len(runs) == 2
    few(place, "model.path=dense", "ratio=0.3", f"output_dir={tmp_path / 'alone'}")
    assert read_report(left)["perplexity"] == read_report(tmp_path / "alone")["perplexity"]


def test_a_recovery_that_broke_off_goes_on(place, monkeypatch, tmp_path):
    from prunekit.recovery import trainer

    train = place / "train.txt"
    train.write_text(TEXT)
    options = [
        "model.path=dense",
        "method=magnitude",
        "recovery=lora",
        *TRAIN[1:],
        "recovery.path=train.txt",
        "recovery.checkpoints=1",
        "eval.speed=false",
        "eval.cache=null",
    ]
    whole, _ = done(*options, "output_dir=whole", cwd=place)
    with monkeypatch.context() as patch:
        name = next(
            n for n in ("training_step", "compute_loss") if hasattr(trainer.RecoveryTrainer, n)
        )
        real, calls = getattr(trainer.RecoveryTrainer, name), []

        def broken(self, *rest, **kwargs):
            calls.append(1)
            if len(calls) > 3:
                raise KeyboardInterrupt
            return real(self, *rest, **kwargs)

        patch.setattr(trainer.RecoveryTrainer, name, broken)
        stopped = command_line(*SMALL, *options, "output_dir=broken", cwd=place)
    assert stopped.returncode == 130
    assert "goes on from there" in stopped.stderr
    assert not (place / "broken" / "model").exists()
    refused = command_line(
        *SMALL, *options, "recovery.rank=4", "resume=true", "output_dir=broken", cwd=place
    )
    assert refused.returncode == 2 and "recovery.rank=8, this run has 4" in refused.stderr
    train.write_text(TEXT.replace("numbers", "digits"))
    refused = command_line(*SMALL, *options, "resume=true", "output_dir=broken", cwd=place)
    assert refused.returncode == 2 and "was made with data=" in refused.stderr
    train.write_text(TEXT)
    again, _ = done(*options, "resume=true", "output_dir=broken", cwd=place)
    assert again["perplexity"] == whole["perplexity"]
    one, two = (
        prunekit.from_pretrained(place / run / "model").state_dict() for run in ("whole", "broken")
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_short_models_corpora_of_one_name_and_dropped_layers(place):
    (place / "others").mkdir()
    (place / "others" / "text.txt").write_text(TEXT.replace("little", "large"))
    shutil.copy(place / "text.txt", place / "others" / "more.txt")
    corpora = "eval.corpora=[./text.txt,others/text.txt,others/more.txt]"
    options = [
        "eval.macs=100",
        "eval.latency.new=100",
        "eval.new_tokens=100",
        "eval.prompts=[Once]",
        "eval.stride=8",
    ]
    report, _ = done(
        "task=evaluate", "model.path=dense", corpora, *options, "output_dir=short", cwd=place
    )
    found = {name: row["model"] for name, row in report["perplexity"].items()}
    assert list(found) == ["./text.txt", "others/text.txt", "more"]
    assert found["more"] == found["./text.txt"] < found["others/text.txt"]
    assert report["macs_protocol"] == "one forward pass of 64 tokens"
    assert len(load_tokenizer(DEMO_MODEL)(report["samples"][0]["model"])["input_ids"]) <= 64
    dropped, _ = done(
        "model.path=dense",
        "groups=layer",
        "policy=uniform",
        "importance=similarity",
        "compensation=none",
        "schedule=oneshot",
        "ratio=0.3",
        "output_dir=dropped",
        cwd=place,
    )
    assert len(dropped["layer_error"]) == 1
    assert dropped["layer_error"][0]["index"] in (0, 1)


def test_two_processes_recover_as_one(place, recovered):
    options = [
        "task=recover",
        "model.path=recovered",
        "eval.baseline=dense",
        "recovery=distill",
        *TRAIN,
        "recovery.patience=1",
        "recovery.stop_on=text.txt",
        "recovery.micro_batch=4",
    ]
    one, _ = done(*options, "output_dir=one", cwd=place)
    both = run_together(COMMAND, *SMALL, *options, "output_dir=two", cwd=place)
    assert [process.returncode for process in both] == [0, 0], both
    two = read_report(place / "two")
    assert two["recovery"]["steps"] == one["recovery"]["steps"]
    for column in one["models"]:
        assert two["perplexity"]["text.txt"][column] == pytest.approx(
            one["perplexity"]["text.txt"][column], rel=1e-3
        )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            ["eval.window=65"],
            "eval.window: expected at most the 64 tokens the model was made for, got 65",
        ),
        (  # a window of text that is not evaluated may have any length
            ["data.calibration.sequence_length=65", "eval.window=65", "eval.corpora=[]"],
            "data.calibration.sequence_length: expected at most the 64 tokens",
        ),
        (
            ["recovery=lora", "recovery.path=text.txt", "recovery.length=65"],
            "recovery.length: expected at most the 64 tokens the model was made for",
        ),
        (["eval.corpora=[empty.txt]"], "empty.txt: it holds no text"),
        (
            [
                "recovery=lora",
                "recovery.path=half.json",
                "recovery.format=alpaca",
                "recovery.length=32",
            ],
            "output",
        ),
        (["recovery=lora", "memory.stream=true"], "memory.stream: can't go with a recovery"),
        (
            ["model.path=no/where", "memory.stream=true"],
            "model.path: the folder no/where does not exist: memory.stream=true reads layers from",
        ),
        (["task=recover"], "task=recover: expected recovery=lora or another, got none"),
        (
            ["task=recover", "recovery=distill", *TRAIN],
            "recovery=distill: expected the dense model",
        ),
        (["task=evaluate", "eval.baseline=nowhere"], "nowhere"),
        (["eval.baseline=dense"], "eval.baseline=dense: task=prune does not act on it; only task="),
        (["eval.prompts=['']"], "eval.prompts: expected prompts of 1 to 63 tokens, got 0: ''"),
        (["eval.batch_size=0"], "eval.batch_size: expected a whole number ≥ 1 or auto, got 0"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place, arguments, match):
    (place / "empty.txt").write_text(" \n")
    (place / "half.json").write_text(json.dumps([{"instruction": "Say no.", "input": ""}]))
    failed = command_line(*SMALL, "model.path=dense", *arguments, "output_dir=failed", cwd=place)
    assert failed.returncode == 2, failed.stdout
    lines = failed.stderr.strip().splitlines()
    assert len(lines) == 1 and match in lines[0], failed.stderr
    left = (
        {path.name for path in (place / "failed").iterdir()}
        if (place / "failed").exists()
        else set()
    )
    shutil.rmtree(place / "failed", ignore_errors=True)
    assert left <= {".state", ".training"}


def test_modules_are_told_apart_by_their_groups():
    model = tiny_llama()
    found = modules_by_kind(model, prunekit.trace(model, example()))
    lone = modules_by_kind(one := tiny_llama(kv_heads=1), prunekit.trace(one, example()))
    assert {name.rpartition(".")[2] for name in lone["attention"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert {name.rpartition(".")[2] for name in found["mlp"]} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert {name.rpartition(".")[2] for name in found["attention"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
