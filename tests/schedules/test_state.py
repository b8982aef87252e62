"""Runs that are broken off, and runs that should not go wrong."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import command_line, tiny_llama, token_ids
from processes import COMMAND, run_python, run_together

import prunekit
from prunekit.errors import CheckpointError, ConfigError
from prunekit.importance import Magnitude
from prunekit.schedules import State

QUICK = [
    "data.calibration.samples=16",
    "data.calibration.sequence_length=48",
    "eval=none",
    "compensation.target=residual",
    "data.calibration.batch_size=5",
]


def equal(left, right):
    return all(
        torch.equal(a, b)
        for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("target", ["pruned", "residual"])
@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_run_broken_off_anywhere_goes_on_to_the_same_end(number, target, monkeypatch, tmp_path):
    options = [f"compensation.target={target}"]
    ids = token_ids(24, 10)
    whole = prunekit.prune(tiny_llama(), calibration=ids, overrides=options)
    record, count = State.record, []

    def interrupted(self, group, finished, consumers):
        if len(count) == number:
            raise KeyboardInterrupt
        count.append(group)
        record(self, group, finished, consumers)

    monkeypatch.setattr(State, "record", interrupted)
    model = tiny_llama()
    before = copy.deepcopy(model)
    with pytest.raises(KeyboardInterrupt):
        prunekit.prune(model, calibration=ids, overrides=options, state=tmp_path / "state")
    assert equal(model, before)
    assert len(list((tmp_path / "state").glob("*.safetensors"))) == number
    assert (tmp_path / "state").exists() == (number > 0)
    monkeypatch.undo()
    options.append("resume=true")
    result = prunekit.prune(model, calibration=ids, overrides=options, state=tmp_path / "state")
    assert result.plan == whole.plan
    assert equal(model, whole.model)
    assert not (tmp_path / "state").exists()


class Signed(Magnitude):
    """Magnitude with an attribute of any kind, which is no option of the configuration."""

    def __init__(self, weights):
        super().__init__()
        object.__setattr__(self, "weights", weights)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"sign": 1}, {"sign": -1}),
        ({"sign": {"a": 1}}, {}),
        ([torch.ones(2)], [torch.zeros(2)]),
        (Path("a"), Path("b")),
    ],
)
def test_a_state_of_another_object_is_refused(first, second, monkeypatch, tmp_path):
    def prune(weights, *overrides):
        return prunekit.prune(
            tiny_llama(),
            importance=Signed(weights),
            schedule="layerwise",
            calibration=token_ids(),
            overrides=overrides,
            state=tmp_path / "state",
        )

    with monkeypatch.context() as patch:
        patch.setattr(
            "prunekit.pipeline.apply_plan",
            lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            prune(first)
    with pytest.raises(CheckpointError, match=r"was made with importance\.weights"):
        prune(second, "resume=true")
    prune(first, "resume=true")


def test_an_object_that_can_not_be_written_down_keeps_no_state(tmp_path):
    options = {"importance": Signed({"sign": len}), "calibration": token_ids()}
    with pytest.raises(ConfigError, match=r"importance\.weights\.sign: expected .* got a builtin"):
        prunekit.prune(tiny_llama(), **options, state=tmp_path / "state")
    prunekit.prune(tiny_llama(), **options, schedule="oneshot", compensation=None)


@pytest.fixture
def left(monkeypatch, tmp_path):
    """The state of a run that stopped before its end."""
    monkeypatch.setattr(
        "prunekit.pipeline.apply_plan", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        prunekit.prune(tiny_llama(), calibration=token_ids(), state=tmp_path / "state")
    monkeypatch.undo()
    return tmp_path / "state"


@pytest.mark.parametrize(
    ("seed", "ids", "options", "match"),
    [
        (0, 4, [], "holds an unfinished run: resume=true"),
        (0, 4, ["resume=true", "ratio=0.3"], r"made with ratio=0\.2, this run has 0\.3"),
        (
            0,
            4,
            ["resume=true", "importance.heads=diagonal"],
            "made with importance.heads=exact, this run has diagonal",
        ),
        (0, 5, ["resume=true"], "made with calibration="),
        (1, 4, ["resume=true"], "made with model="),
    ],
)
def test_a_state_that_does_not_fit_is_refused(left, seed, ids, options, match):
    with pytest.raises(CheckpointError, match=match):
        prunekit.prune(
            tiny_llama(seed=seed), calibration=token_ids(ids), overrides=options, state=left
        )
    assert (left / "state.json").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(
        CheckpointError, match="expected a new folder or the state of an unfinished run"
    ):
        prunekit.prune(tiny_llama(), calibration=token_ids(), state=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("file", ["state.json", "counts.json", "layers.1.mlp.safetensors"])
def test_a_damaged_state_is_refused(left, file):
    content = (left / file).read_bytes()
    (left / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{file}: damaged"):
        prunekit.prune(tiny_llama(), calibration=token_ids(), overrides=["resume=true"], state=left)


def test_a_full_disk_keeps_what_was_finished(monkeypatch, tmp_path):
    from safetensors import torch as safetensors

    save, count = safetensors.save_file, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) > 2:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(safetensors, "save_file", full)
    model = tiny_llama()
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match=r"can't be written: .*No space left"):
        prunekit.prune(model, calibration=token_ids(), state=tmp_path / "state")
    monkeypatch.undo()
    assert equal(model, before)
    assert (
        len(list((tmp_path / "state").iterdir())) == 4
    )  # two groups, the facts, the counts: nothing half-written
    result = prunekit.prune(
        model, calibration=token_ids(), overrides=["resume=true"], state=tmp_path / "state"
    )
    assert equal(model, prunekit.prune(tiny_llama(), calibration=token_ids()).model)
    assert result.plan


@pytest.fixture(scope="module")
def quick(short_model):
    return [f"model.path={short_model}", *QUICK, "output_dir=out"]


@pytest.fixture(scope="module")
def whole(quick, tmp_path_factory):
    """An unbroken run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    return check_finished([command_line(*quick, cwd=folder)], folder)


def check_finished(processes, folder):
    for done in processes:
        assert done.returncode == 0, done.stderr
    assert sum(done.stdout.count("parameters;") for done in processes) == 1  # one process talks
    return folder / "out"


# A process that is killed when it has finished its third group: in the middle of a layer.
_KILLED = (
    """
import os, signal, sys
from prunekit.schedules import State
record, finished = State.record, []
def record_three(*arguments, **more):
    if len(finished) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    finished.append(arguments)
    record(*arguments, **more)
State.record = record_three
"""
    + COMMAND
)


@pytest.mark.parametrize("stream", ["false", "true"])
def test_killed_in_the_middle_of_a_layer(stream, quick, whole, tmp_path):
    options = [*quick, f"memory.stream={stream}"]
    killed = run_python(_KILLED, *options, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "out").glob(".state/*.safetensors"))) == 3
    assert not (tmp_path / "out/model").exists()
    out = check_finished([command_line(*options, "resume=true", cwd=tmp_path)], tmp_path)
    assert equal(*(prunekit.from_pretrained(folder / "model") for folder in (out, whole)))
    assert (out / "plan.json").read_text() == (whole / "plan.json").read_text()
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("at", ["job.save_pretrained", "folder.write_pictures"])
def test_killed_while_the_result_is_written(at, short_model, monkeypatch, tmp_path):
    from prunekit import config as cfg
    from prunekit import jobs
    from prunekit.jobs import folder

    overrides = [f"model.path={short_model}", "data.calibration.samples=4", "eval=none"]
    overrides.append("output_dir=out")
    monkeypatch.setattr(
        f"prunekit.jobs.{at}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    monkeypatch.setattr(folder, "clear_results", lambda _: None)  # no time for that
    with pytest.raises(KeyboardInterrupt):
        jobs.run(cfg.check(cfg.compose(overrides)), tmp_path / "out", {"config.yaml": "x"})
    monkeypatch.undo()
    (tmp_path / "out/.model.half").mkdir()
    jobs.run(
        cfg.check(cfg.compose([*overrides, "resume=true"])), tmp_path / "out", {"config.yaml": "x"}
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".hydra",
        "model",
        "plan.json",
        "report.json",
        "report.md",
        "report.html",
        "layers.svg",
        "ratio.svg",
    }


@pytest.mark.parametrize("stream", ["false", "true"])
def test_two_processes_leave_what_one_does(stream, quick, whole, tmp_path):
    both = run_together(COMMAND, *quick, f"memory.stream={stream}", cwd=tmp_path)
    out = check_finished(both, tmp_path)
    assert json.loads((out / "plan.json").read_text()) == json.loads(
        (whole / "plan.json").read_text()
    )
    one, two = (prunekit.from_pretrained(folder / "model").state_dict() for folder in (whole, out))
    for name in one:
        torch.testing.assert_close(
            one[name].float(), two[name].float(), rtol=2e-2, atol=2e-3
        )  # float16 on disk


_FAILING = """
import torch, prunekit
from prunekit.runtime.processes import process_group
from prunekit.errors import DataError
from conftest import tiny_llama, token_ids
model = tiny_llama()
embedded = model.get_input_embeddings()(token_ids(8, 9)).detach()
embedded[{sample}, 3, 2] = torch.nan
given = [{{"inputs_embeds": part, "use_cache": False}} for part in embedded.split(2)]
with process_group(torch.device("cpu")):
    try:
        prunekit.prune(model, calibration=given)
    except DataError as error:
        print(error)
"""


def test_an_error_in_one_process_ends_all_of_them(tmp_path):
    expected = (
        "model.layers.0.mlp.down_proj: its inputs hold NaN or infinity in calibration sample 3"
    )
    for done in run_together(_FAILING.format(sample=3), cwd=tmp_path):  # the second process's
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


@pytest.mark.parametrize("ids", [token_ids(1, 12), torch.full((1, 9), 5), torch.full((6, 9), 5)])
@pytest.mark.parametrize("ratio", [0.2, 0.55])
def test_one_sample_or_one_token_over_and_over(ids, ratio):
    model = tiny_llama()
    prunekit.prune(model, ratio=ratio, calibration=ids)
    assert torch.isfinite(model(input_ids=token_ids()).logits).all()


def test_down_to_one_unit_and_groups_of_one():
    model = tiny_llama(kv_heads=2)
    everything = prunekit.trace(model, {"input_ids": token_ids(2, 7), "use_cache": False})
    most = prunekit.prune(
        model, ratio=0.57, calibration=token_ids(8, 12), overrides=["policy=uniform"]
    )
    left = [everything[name].num_units - len(units) for name, units in most.plan.removed.items()]
    assert min(left) == 1
    assert torch.isfinite(model(input_ids=token_ids()).logits).all()
    again = prunekit.prune(
        model, ratio=0.01, calibration=token_ids(8, 12), overrides=["policy=uniform"]
    )
    assert again.plan


def test_dead_inputs_go_first_and_all_dead_does_no_harm():
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.up_proj.weight.zero_()
            layer.mlp.up_proj.bias.zero_()
        model.model.layers[0].mlp.up_proj.weight[:10] = 0
        model.model.layers[0].mlp.up_proj.bias[:10] = 0
        before = model(input_ids=token_ids()).logits
        result = prunekit.prune(
            model,
            ratio=0.05,
            calibration=token_ids(8, 12),
            overrides=["groups=mlp", "policy=uniform"],
        )
        after = model(input_ids=token_ids()).logits
    assert set(result.plan.removed["layers.0.mlp"]) <= set(range(10))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)
