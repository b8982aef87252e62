"""The functions of the Python API: objects as well as names, and no override that is ignored."""

import json
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest
import torch
from conftest import command_line, tiny_llama, token_ids

import prunekit
from prunekit import config as cfg
from prunekit.allocation.costs.parameters import Parameters
from prunekit.checkpoint import load_tokenizer
from prunekit.compensation import Obs as Repair
from prunekit.demo import DEMO_MODEL
from prunekit.errors import CheckpointError, ConfigError, DataError
from prunekit.exports import Export, Written
from prunekit.importance import Magnitude, ScoreImportance
from prunekit.policies import Uniform
from prunekit.recovery import Recovery
from prunekit.schedules import Layerwise
from prunekit.schedules.method import describe_objects

QUICK = ["eval.max_tokens=512", "eval.speed=false", "eval.prompts=[]", "eval.layer_tokens=0"]
QUICK += ["eval.macs=0", "eval.cache=null"]
CALIBRATION = ["data.calibration.samples=4", "data.calibration.sequence_length=32"]


@dataclass(frozen=True, kw_only=True)
class HighestFirst(ScoreImportance):
    """Scores that no backend of prunekit gives: the last units go first."""

    def structures(self, model, graph, groups, batches):
        """The negated index, made positive."""
        return {g.name: torch.arange(g.num_units, 0, -1, dtype=torch.float64)[None] for g in groups}


def prune(model=None, calibration=None, **options):
    calibration = token_ids(8, 12) if calibration is None else calibration
    return prunekit.prune(model or tiny_llama(), calibration=calibration, **options)


def every_key():
    """Each key of the configuration, sections with fields of their own key by key."""
    config = cfg.RunConfig()
    for own in fields(config):
        section = getattr(config, own.name)
        inside = [f".{f.name}" for f in fields(section)] if is_dataclass(section) else [""]
        yield from (f"{own.name}{key}" for key in inside)
    yield from ("method", "experiment", "hydra.run.dir", "importance.heads", "eval.latency.new")


@pytest.mark.parametrize("call", cfg.CALLS, ids=lambda call: call.name)
def test_every_key_is_acted_on_or_refused_with_advice(call):
    acted_on = 0
    for key in every_key():
        try:
            cfg.check_acted_on([f"{key}=1"], call.name, call.acts_on, call.instead)
            assert any(key == own or key.startswith(f"{own}.") for own in call.acts_on)
            acted_on += 1
        except ConfigError as error:
            message = str(error)
            assert message.startswith(f"{key}=1: {call.name} does not act on it; ")
            assert not message.endswith("; leave it out"), f"{key}: no advice"
            assert "\n" not in message
    assert acted_on
    known = {key.split(".")[0] for key in every_key()}
    assert {key.split(".")[0] for key in [*call.acts_on, *call.instead]} <= known


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("recovery=lora", "prunekit.recover"),
        ("eval.window=64", "prunekit.evaluate"),
        ("export=gguf", "prunekit.export"),
        ("device=cpu", r"model.to\(device\)"),
        ("dtype=float16", r"model.to\(dtype\)"),
        ("memory.stream=true", "prunekit.prune_checkpoint"),
        ("model.path=x", "prunekit.prune_checkpoint"),
        ("output_dir=x", "prunekit.save_pretrained"),
        ("task=trace", "each task is a function"),
        ("data=c4", "calibration=…"),
        ("+data.calibration.path=x", "calibration=…"),
        ("data.calibration.samples=3", "calibration=…"),
        ("plans=[a,b]", "task=diff"),
        ("experiment=rates", "command line"),
        ("method=random", r"prunekit.prune\(method=…\)"),
        ("hydra.run.dir=x", "only hydra.searchpath"),
        ("resume=true", "expected state=FOLDER"),
    ],
)
def test_prune_refuses_what_it_would_ignore(override, match):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=match):
        prune(model, overrides=[override])
    with pytest.raises(ConfigError, match="data.calibration.batch_size=4"):
        batches = [{"input_ids": token_ids(2, 8)}]
        prune(model, batches, overrides=["data.calibration.batch_size=4"])


def test_names_objects_and_overrides_say_the_same():
    named = prune(importance="magnitude", policy="uniform", compensation="obs", cost="parameters")
    objects = prune(
        importance=Magnitude(),
        policy=Uniform(),
        compensation=Repair(),
        schedule=Layerwise(damping=0.0001),
        cost=Parameters(),
    )
    overrides = prune(overrides=["importance=magnitude", "policy=uniform"])
    assert named.plan == objects.plan == overrides.plan
    states = [result.model.state_dict() for result in (named, objects, overrides)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]) and torch.equal(tensor, states[2][name])


def test_an_object_of_ones_own_decides():
    options = {"schedule": "oneshot", "policy": "uniform", "ratio": 0.1}
    result = prune(importance=HighestFirst(), compensation=None, **options)
    for group in result.graph.groups:
        removed = result.plan.removed.get(group.name, [])
        assert sorted(removed) == list(range(group.num_units - len(removed), group.num_units))
    none = prune(importance=HighestFirst(), compensation="none", **options)
    assert none.plan == result.plan
    assert any(result.plan.removed.values())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"importance": "magnitud"}, "importance: unknown choice 'magnitud': did you mean magn"),
        ({"importance": 5}, "importance: expected a name, or an object of a subclass of prunekit"),
        ({"policy": Magnitude()}, "policy: expected a name, or an object of a subclass"),
        ({"cost": Uniform()}, "cost: expected a name, or an object of a subclass"),
        (
            {"importance": Magnitude(), "overrides": ["importance.p=1"]},
            "importance.p=1: .* importance was given as an object; set its options there",
        ),
        (
            {"importance": "magnitude", "overrides": ["importance=obs"]},
            "importance: given twice, as an argument of prunekit.prune and by overrides",
        ),
        ({"overrides": "policy=uniform"}, "overrides: expected a list of strings"),
        ({"model": 5}, "model: expected a torch module, got 5; a folder: prunekit.prune_checkp"),
        ({"overrides": None}, "overrides: expected a list of strings, got None"),
        ({"overrides": [5]}, "overrides: expected a list of strings, got 5 in it"),
        ({"ratio": 0.3, "overrides": ["ratio=0.5"]}, "ratio: given twice"),
        ({"policy": "null"}, "policy: unknown choice 'null': .*available: expected_loss"),
        ({"overrides": ["imports=[nowhere.rules]"]}, "imports: expected modules .*nowhere.rules"),
        (
            {"overrides": ["importance._target_=prunekit.policies.Uniform"]},
            "importance: expected a subclass of prunekit.importance.base.Importance, got prunekit",
        ),
    ],
)
def test_mistakes_are_one_line(options, match):
    with pytest.raises(ConfigError, match=match) as caught:
        prune(**options)
    assert "\n" not in str(caught.value)


def test_calibration_that_is_no_data_is_an_error_of_one_line():
    with pytest.raises(DataError, match=r"calibration: expected token ids \[N, T\] .* got 5"):
        prune(calibration=5)


def test_a_state_knows_the_objects_it_was_made_with(tmp_path, monkeypatch):
    from prunekit.errors import CheckpointError
    from prunekit.schedules import State

    recorded = State.record

    def stop(*arguments):
        recorded(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(State, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(importance=Magnitude(), state=tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"importance\.p=2, this run has 1"):
        prune(importance=Magnitude(p=1), state=tmp_path / "state", overrides=["resume=true"])
    resumed = prune(importance=Magnitude(), state=tmp_path / "state", overrides=["resume=true"])
    assert resumed.plan == prune(importance=Magnitude()).plan


def test_a_record_says_what_it_can_not_hold():
    config = cfg.RunConfig()
    backend = Custom(rule=len)
    describe_objects(config, {"importance": backend})
    assert config.importance["scale"] == 2
    assert config.importance["rule"] == "builtin_function_or_method, which can't be written down"
    with pytest.raises(ConfigError, match="importance.rule: expected a number, text, path"):
        describe_objects(config, {"importance": backend}, whole=True)


@dataclass(frozen=True, kw_only=True)
class Custom(HighestFirst):
    """An importance with a function among its attributes."""

    rule: object
    scale: float = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory, short_model):
    """A folder that `prune_checkpoint` wrote."""
    out = tmp_path_factory.mktemp("api") / "out"
    report = prunekit.prune_checkpoint(
        short_model, out, ratio=0.3, method="magnitude", overrides=[*QUICK, *CALIBRATION]
    )
    return out, report


def test_prune_checkpoint_is_the_task_of_the_command_line(run, short_model, tmp_path):
    out, report = run
    done = command_line(
        f"model.path={short_model}",
        "ratio=0.3",
        "method=magnitude",
        *QUICK,
        *CALIBRATION,
        "output_dir=out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for name in ("plan.json", "model/model.safetensors", "model/config.json"):
        assert (out / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    other = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["perplexity"] == other["perplexity"]
    assert json.loads((out / "report.json").read_text())["perplexity"] == other["perplexity"]
    assert "magnitude" in (out / ".hydra" / "config.yaml").read_text()
    with pytest.raises(prunekit.PrunekitError, match="exists and is not empty"):
        prunekit.prune_checkpoint(short_model, out)
    with pytest.raises(ConfigError, match="the folder of the run is the second argument"):
        prunekit.prune_checkpoint(short_model, tmp_path / "no", overrides=["output_dir=x"])


def test_prune_checkpoint_streams_with_objects(short_model, tmp_path, monkeypatch):
    from prunekit.calibration.example import ExampleStates
    from prunekit.importance import Obs

    options = {"ratio": 0.2, "importance": Obs(heads="diagonal")}
    for name, stream in (("whole", "false"), ("streamed", "true")):
        prunekit.prune_checkpoint(
            short_model,
            tmp_path / name,
            **options,
            overrides=[*CALIBRATION, "eval=none", f"memory.stream={stream}"],
        )
    one, two = (tmp_path / name / "plan.json" for name in ("whole", "streamed"))
    assert one.read_text() == two.read_text()
    with pytest.raises(ConfigError, match="memory.stream: can't go with an importance that"):
        prunekit.prune_checkpoint(
            short_model,
            tmp_path / "no",
            importance=Magnitude(),
            overrides=[*CALIBRATION, "memory.stream=true"],
        )
    monkeypatch.setattr(ExampleStates, "record", lambda *_: None)  # none of transformers' does so
    with pytest.raises(CheckpointError, match="layers: the layers can't be run one by one; mem"):
        prunekit.prune_checkpoint(
            short_model, tmp_path / "no", overrides=[*CALIBRATION, "memory.stream=true"]
        )


def test_evaluate_a_folder_and_a_model_in_memory(run, short_model, tmp_path):
    out, before = run
    report = prunekit.evaluate(out, baseline=short_model, out=tmp_path / "e", overrides=QUICK)
    assert report["models"] == ["dense", "model"]
    figures = report["perplexity"]["embedded"]
    expected = before["perplexity"]["embedded"]
    assert figures["model"] == expected["pruned"]
    assert figures["dense"] == expected["dense"]
    assert (tmp_path / "e" / "report.json").exists()
    assert not (tmp_path / "e" / "model").exists()
    model = prunekit.from_pretrained(out / "model")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    torch.manual_seed(3)
    expected_number = torch.rand(1)
    torch.manual_seed(3)
    alone = prunekit.evaluate(model, tokenizer=load_tokenizer(DEMO_MODEL), overrides=QUICK)
    assert torch.equal(torch.rand(1), expected_number), "the caller's random numbers go on"
    assert alone["models"] == ["model"]
    assert alone["perplexity"]["embedded"]["model"] == figures["model"], "in float32 as well"
    assert model.dtype == model.config.dtype == torch.float16
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float16
        assert torch.equal(weight, weights[name])


def test_recover_a_model_in_memory_and_a_folder(run, short_model, tmp_path):
    out, _ = run
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"import module_{n}\nprint({n})" for n in range(400)))
    settings = {"path": str(text), "length": 32, "batch_size": 8, "samples": 16}
    settings |= {"evaluations": 0, "holdout": 2}
    model, tokenizer = prunekit.from_pretrained(out / "model"), load_tokenizer(DEMO_MODEL)
    model.float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recovered = prunekit.recover(
        model, tokenizer, recovery=Recovery(**settings), out=tmp_path / "o", overrides=QUICK
    )
    recorded = (tmp_path / "o" / ".hydra" / "config.yaml").read_text()
    assert "_target_: prunekit.recovery.settings.Recovery" in recorded
    assert "holdout: 2" in recorded
    assert recovered.model is model
    assert recovered.report["models"] == ["pruned", "recovered"]
    assert recovered.report["recovery"]["steps"] > 0
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    options = [f"recovery.{key}={value}" for key, value in settings.items()]
    written = prunekit.recover(
        out, recovery="lora", dense=short_model, out=tmp_path / "r", overrides=[*QUICK, *options]
    )
    assert written.report["models"] == ["dense", "pruned", "recovered"]
    assert written.report["layers"] == run[1]["layers"]
    loaded = prunekit.from_pretrained(tmp_path / "r" / "model").state_dict()
    assert all(torch.equal(t, loaded[name]) for name, t in written.model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: prunekit.evaluate(m), "tokenizer: expected the tokenizer of the model"),
        (lambda m: prunekit.evaluate(5), "model: expected a model of transformers, its folder"),
        (
            lambda m: prunekit.evaluate(m, tokenizer=0, overrides=["device=cpu"]),
            "device=cpu: prunekit.evaluate does not act on it; the model is loaded already",
        ),
        (
            lambda m: prunekit.recover(m, 0, overrides=["resume=true"]),
            "resume=true: prunekit.recover does not act on it; give prunekit.recover a folder",
        ),
        (
            lambda m: prunekit.recover(m, 0, overrides=["recovery.merge=false"]),
            "recovery.merge=false: expected out=FOLDER for the adapter",
        ),
        (
            lambda m: prunekit.recover(m, 0, recovery=Recovery(), overrides=["recovery.rank=4"]),
            "recovery.rank=4: .* given twice: recovery was given as an object",
        ),
        (
            lambda m: prunekit.export(
                m, "out", format=Recovery(), overrides=["export=gguf", "+export.dtype=q8_0"]
            ),
            "export=gguf: .* given twice: export was given as an object",
        ),
        (
            lambda m: prunekit.export(m, "o", format=Recovery(), overrides=["+export.dtype=q8_0"]),
            "export.dtype=q8_0: .* given twice",
        ),
        (
            lambda m: prunekit.export(m, "o", format=5, overrides=["export.remote_code=true"]),
            "export: expected a name, or an object",
        ),
        (
            lambda m: prunekit.evaluate(m, baseline="x", overrides=["eval.baseline=/nope"]),
            "eval.baseline=/nope: .* given twice: the dense model is an argument",
        ),
        (
            lambda m: prunekit.recover("x", dense=m, overrides=["eval.baseline=/nope"]),
            "eval.baseline=/nope: .* given twice: the dense model is an argument",
        ),
        (
            lambda m: prunekit.prune_checkpoint("x", "out", overrides=["eval.baseline=/nope"]),
            "eval.baseline=/nope: .* the dense model is the first argument",
        ),
        (
            lambda m: prunekit.prune_checkpoint("x", "out", overrides=["experiment=compare"]),
            "experiment=compare: .* does not act on it; sweep on the command line",
        ),
        (
            lambda m: prunekit.evaluate(m, overrides=["model.trust_remote_code=true"]),
            "model.trust_remote_code=true: .* loaded already: give it to from_pretrained",
        ),
        (
            lambda m: prunekit.evaluate("x", overrides=["policy=uniform"]),
            r"policy=uniform: prunekit.evaluate does not act on it; it says how a model is pruned",
        ),
        (
            lambda m: prunekit.recover("x", recovery=Magnitude()),
            "recovery: expected a name, or an object of prunekit.recovery.Recovery, got Magn",
        ),
        (
            lambda m: prunekit.prune_checkpoint(m, "out"),
            "folder: expected the path of a folder, got LlamaForCausalLM; a model in memory",
        ),
        (lambda m: prunekit.evaluate("x", out=5), "out: expected the path of a folder, got int"),
        (
            lambda m: prunekit.evaluate(m, tokenizer="gpt2"),
            "tokenizer: expected a tokenizer of transformers, .* got 'gpt2'",
        ),
        (lambda m: prunekit.evaluate("x", baseline=""), "the dense model: expected .* got ''"),
        (lambda m: prunekit.export("x", "out"), "task=export: expected export=gguf"),
        (lambda m: prunekit.export("x", "out", format="guff"), "did you mean gguf"),
        (lambda m: prunekit.export("x", "out", format=5), "export: expected a name, or an obj"),
    ],
)
def test_mistakes_of_the_other_functions(call, match):
    with pytest.raises(ConfigError, match=match) as caught:
        call(tiny_llama())
    assert "\n" not in str(caught.value)


def test_export_a_folder_and_a_model_in_memory(run, tmp_path):
    out, _ = run
    (folder,) = prunekit.export(out, tmp_path / "code", overrides=["export.remote_code=true"])
    assert folder == tmp_path / "code" / "model"
    assert (folder / "README.md").exists(), "the card of the run"

    class Lines(Export):
        """A format of one's own: the names of the parameters, one a line."""

        name = "lines"
        target = "names.txt"

        def check_model(self, model):
            """Any model."""

        def create(self, path, model, tokenizer):
            """Write the file."""
            path.write_text("\n".join(name for name, _ in model.named_parameters()))
            return Written(file=path, about="names")

    model = prunekit.from_pretrained(out / "model")
    (path,) = prunekit.export(
        model, tmp_path / "lines", tokenizer=load_tokenizer(out / "model", False), format=Lines()
    )
    assert path.read_text().splitlines() == [name for name, _ in model.named_parameters()]


def test_import_is_cheap_and_everything_public_is_there():
    program = "import sys, prunekit; print([m for m in ('torch', 'hydra', 'omegaconf', "
    program += "'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert sorted(prunekit.__all__) == prunekit.__all__
    for name in prunekit.__all__:
        assert getattr(prunekit, name).__doc__, name
        assert name in dir(prunekit)
    assert (Path(prunekit.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", ["prune", "evaluate", "recover", "export", "prune_checkpoint"])
def test_docstrings_name_every_argument(name):
    import inspect

    function = getattr(prunekit, name)
    text = inspect.getdoc(function)
    for part in ("Example:", "Args:", "Returns:", "Raises:"):
        assert part in text, part
    for argument in inspect.signature(function).parameters:
        assert f"    {argument}: " in text, argument
