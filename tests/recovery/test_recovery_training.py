import json
import signal
import time

import pytest
import torch
from processes import Python, run_together
from recovery_helpers import clone, logits, pruned, run, settings, small, state, texts, tiny_gpt2
from safetensors.torch import load_file

import prunekit
from prunekit import config as cfg
from prunekit.errors import ConfigError, DataError
from prunekit.recovery import Recovery
from prunekit.recovery.trainer import RecoveryTrainer


def assert_same(one, two, **tolerance):
    for name, tensor in state(one).items():
        torch.testing.assert_close(
            tensor, state(two)[name], **({"rtol": 0, "atol": 0} | tolerance), msg=name
        )


@pytest.mark.parametrize("make", [lambda: pruned(small()), lambda: pruned(tiny_gpt2())])
def test_recovery_lowers_perplexity_and_leaves_a_plain_model(tmp_path, make):
    model = make()
    model.model_parallel_marker = "kept"
    attributes, modules = (
        set(vars(model)),
        [(n, type(m), m.training) for n, m in model.named_modules()],
    )
    names, config = [n for n, _ in model.named_parameters()], model.config.to_dict()
    seen = []
    watch = {"other": lambda m: seen.append((m is model, m.training)) or 7.0 + len(seen)}
    report = run(model, settings(texts(tmp_path), epochs=3), tmp_path / "out", watch=watch)
    measured = [point["perplexity"] for point in report["curve"] if "perplexity" in point]
    assert [set(m) for m in measured] == [{"validation", "other"}] * 3
    assert measured[-1]["validation"] < measured[0]["validation"]
    assert seen == [(True, False)] * 3
    assert set(vars(model)) == attributes and model.config.to_dict() == config
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == modules
    assert [n for n, _ in model.named_parameters()] == names
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not list((tmp_path / "out").iterdir())
    assert json.loads(json.dumps(report)) == report
    assert (report["steps"], report["best_step"], report["stopped_early"], report["examples"]) == (
        15,
        15,
        False,
        20,
    )
    assert report["tokens"] == report["curve"][-1]["tokens"] == 3 * sum(report_tokens(tmp_path))


def report_tokens(folder):
    """What the training examples predict, counted by hand: every token but the first, cut at 24,
    end included.
    """
    from recovery_helpers import Letters

    from prunekit.recovery.data import load_data

    data = load_data(settings(texts(folder)), Letters(), {}, 0)
    return [len(row[0].ids) - 1 for row in data.training]


def test_the_first_step_is_adamw_on_the_mean_over_the_batch(tmp_path):
    """One step without LoRA against a hand-written one."""
    from recovery_helpers import Letters

    from prunekit.recovery.data import load_data

    recovery = settings(
        texts(tmp_path), lora=False, epochs=1, batch_size=20, micro_batch=5, clip=0.0, evaluations=0
    )
    model, manual = small(), small()
    report = run(model, recovery, tmp_path)
    total, count = 0.0, 0
    for (example,) in load_data(recovery, Letters(), {}, 0).training:
        ids = example.ids.long()
        log_p = manual(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        total, count = (
            total - log_p[torch.arange(len(ids) - 1), ids[1:]].sum(),
            count + len(ids) - 1,
        )
    (total / count).backward()
    assert report["curve"][0]["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    torch.optim.AdamW(manual.parameters(), lr=3e-3, weight_decay=0.0).step()
    assert_same(model, manual, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("micro", [1, 2])
def test_the_micro_batch_does_not_matter(tmp_path, micro):
    path, start = texts(tmp_path, 23), pruned(small())
    one, other = clone(start), clone(start)
    whole = run(one, settings(path, epochs=1), tmp_path / "a")
    parts = run(other, settings(path, epochs=1, micro_batch=micro), tmp_path / "b")
    assert_same(one, other, rtol=1e-3, atol=2e-5)
    assert whole["curve"][-1]["validation_loss"] == pytest.approx(
        parts["curve"][-1]["validation_loss"], rel=1e-5
    )


def test_patience_stops_and_goes_back_to_the_best(tmp_path):
    path, model = texts(tmp_path), small()
    values = iter([5.0, 4.0, 6.0, 7.0, 8.0])
    kept = []

    def watched(m):
        kept.append(logits(m))
        return next(values)

    recovery = settings(path, evaluations=8, patience=2, stop_on="other", epochs=4, checkpoints=1)
    report = run(model, recovery, tmp_path, watch={"other": watched})
    assert (report["stopped_early"], len(kept)) == (True, 4)
    assert report["best_step"] == [p["step"] for p in report["curve"] if "perplexity" in p][1]
    torch.testing.assert_close(logits(model), kept[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(kept[1], kept[3], rtol=1e-5, atol=1e-5)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "options", [{}, {"lora": False, "patience": 9}, {"patience": 4, "stop_on": "w"}]
)
def test_a_run_goes_on_from_its_checkpoint_as_if_unbroken(tmp_path, options):
    path, start = texts(tmp_path), pruned(small())
    recovery = settings(path, evaluations=5, checkpoints=3, dropout=0.1, **options)
    unbroken, broken = clone(start), clone(start)
    calls = []

    def fail(m):
        calls.append(1)
        if len(calls) == 4:  # after step 6 of 10
            raise Stop
        return 1.0

    whole = run(unbroken, recovery, tmp_path / "a", watch={"w": lambda m: 1.0})
    with pytest.raises(Stop):
        run(broken, recovery, tmp_path / "b", watch={"w": fail})
    assert_same(broken, start) if recovery.lora else None
    assert [type(m) for m in broken.modules()] == [type(m) for m in start.modules()]
    assert [p.name for p in (tmp_path / "b" / "checkpoints").glob("checkpoint-*")] == [
        "checkpoint-3"
    ]
    again = clone(start)
    resumed = run(again, recovery, tmp_path / "b", watch={"w": lambda m: 1.0}, resume=True)
    assert_same(again, unbroken)
    same = ("curve", "steps", "best_step", "tokens")
    assert {key: resumed[key] for key in same} == {key: whole[key] for key in same}


SCRIPT = """
import os, sys
from recovery_helpers import run, settings, small, pruned
from pathlib import Path
import json
import torch.distributed as dist
from safetensors.torch import save_file
folder = Path(sys.argv[1])
options = json.loads(sys.argv[2])
model = pruned(small())
recovery = settings(str(folder / "texts.jsonl"), **options)
report = run(model, recovery, folder / "out", resume="resume" in sys.argv)
if os.environ.get("RANK", "0") == "0":
    save_file(dict(model.named_parameters()), folder / "weights.safetensors")
    (folder / "report.json").write_text(json.dumps(report))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_two_processes_train_the_same_model(tmp_path):
    path, model = texts(tmp_path, 23), pruned(small())
    options = {"epochs": 1, "micro_batch": 2}
    whole = run(model, settings(path, **options), tmp_path / "one")
    for done in run_together(SCRIPT, tmp_path, json.dumps(options), cwd=tmp_path):
        assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "report.json").read_text())
    assert [p["tokens"] for p in parts["curve"]] == [p["tokens"] for p in whole["curve"]]
    for one, two in zip(whole["curve"], parts["curve"], strict=True):
        for key in {"loss", "validation_loss"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-5)
    for name, tensor in load_file(tmp_path / "weights.safetensors").items():
        torch.testing.assert_close(tensor, state(model)[name], rtol=1e-3, atol=2e-5, msg=name)


def test_a_killed_run_goes_on(tmp_path):
    path, model = texts(tmp_path), pruned(small())
    options = {"epochs": 10, "checkpoints": 4}
    python = Python(SCRIPT, tmp_path, json.dumps(options), cwd=tmp_path)
    checkpoints = tmp_path / "out" / "checkpoints"
    until = time.monotonic() + 60
    while (
        not list(checkpoints.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < until
    ):
        time.sleep(0.01)
    python.process.kill()
    assert python.finish().returncode == -signal.SIGKILL
    assert list(checkpoints.glob("checkpoint-*"))
    whole = run(clone(model), settings(path, **options), tmp_path / "whole")
    resumed = run(model, settings(path, **options), tmp_path / "out", resume=True)
    assert resumed["curve"] == whole["curve"]


def out_of_memory_above(model, rows, after=0):
    """Make a model's forward pass fail on more rows than that, from the `after`-th call on."""
    plain, calls = model.forward, []

    def forward(*args, input_ids=None, **kwargs):
        calls.append(len(input_ids))
        if len(input_ids) > rows and len(calls) > after and model.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return plain(*args, input_ids=input_ids, **kwargs)

    model.forward = forward
    return calls


def test_out_of_memory_halves_the_micro_batch_and_starts_over(tmp_path):
    path, start = texts(tmp_path), pruned(small())
    model, direct = clone(start), clone(start)
    out_of_memory_above(model, 2, after=6)
    recovery = settings(path, micro_batch="auto", batch_size=8, dropout=0.1, checkpoints=1)
    report = run(model, recovery, tmp_path / "a")
    del model.forward
    assert report["settings"]["micro_batch"] == 2
    run(direct, settings(path, micro_batch=2, batch_size=8, dropout=0.1), tmp_path / "b")
    assert_same(model, direct)


def test_out_of_memory_with_a_fixed_size_names_the_setting(tmp_path):
    model = small()
    before = state(model)
    out_of_memory_above(model, 2)
    with pytest.raises(
        DataError, match=r"out of memory with micro_batch=4; recovery.micro_batch=2 halves it"
    ):
        run(model, settings(texts(tmp_path)), tmp_path)
    out_of_memory_above(model, 0)
    with pytest.raises(DataError, match=r"out of memory with one row; recovery.length"):
        run(model, settings(texts(tmp_path), micro_batch="auto"), tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_a_loss_that_is_no_number_names_the_step(tmp_path):
    model = small()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="the loss at step 1 is nan"):
        run(model, settings(texts(tmp_path), evaluations=0), tmp_path)


@pytest.mark.parametrize("lora", [True, False])
def test_weights_that_are_no_number_after_the_last_step_are_named(lora, monkeypatch, tmp_path):
    train = RecoveryTrainer.train

    def diverge(self, *args, **kwargs):
        train(self, *args, **kwargs)
        with torch.no_grad():
            next(p for p in self.trained.parameters() if p.requires_grad).fill_(float("nan"))

    monkeypatch.setattr(RecoveryTrainer, "train", diverge)
    model = small()
    before = state(model)
    with pytest.raises(DataError, match="recovery: it has diverged: .* hold NaN or infinity; a sm"):
        run(model, settings(texts(tmp_path), evaluations=0, lora=lora), tmp_path)
    if lora:
        assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_mixed_precision_leaves_no_wrapper(tmp_path):
    for lora in (True, False):
        model = small().bfloat16()
        report = run(
            model, settings(texts(tmp_path), epochs=1, bf16=True, lora=lora), tmp_path / str(lora)
        )
        assert report["settings"]["bf16"]
        assert "forward" not in vars(model) and {p.dtype for p in model.parameters()} == {
            torch.bfloat16
        }
        perplexity = [p["perplexity"]["validation"] for p in report["curve"] if "perplexity" in p]
        assert perplexity[-1] < perplexity[0]


def test_presets_are_the_papers():
    built = {
        name: cfg.build(cfg.check(cfg.compose([f"recovery={name}"])).recovery, "recovery")
        for name in ("lora", "llm_pruner", "slimgpt", "distill", "none")
    }
    assert built["none"] is None
    assert built["lora"] == Recovery()
    for name in ("llm_pruner", "slimgpt"):
        preset = built[name]
        assert (preset.rank, preset.alpha, preset.dropout, preset.learning_rate) == (
            8,
            16,
            0.05,
            1e-4,
        )
        assert (preset.batch_size, preset.length, preset.merge) == (64, 256, True)
    assert (built["llm_pruner"].corpus, built["slimgpt"].corpus) == ("alpaca", "alpaca_raw")
    assert (built["llm_pruner"].epochs, built["llm_pruner"].warmup_steps) == (2, 100)
    assert (built["slimgpt"].epochs, built["slimgpt"].schedule) == (1, "cosine")
    assert built["distill"].needs_teacher


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"format": "alpacca"}, "recovery.format: unknown choice 'alpacca': did you mean alpaca"),
        ({"schedule": "step"}, "recovery.schedule: unknown choice 'step'"),
        ({"targets": ["mlp", "head"]}, "recovery.targets: unknown choice 'head'"),
        ({"targets": []}, "recovery.targets: expected a choice of all, mlp, attention"),
        ({"rank": 0}, "recovery.rank: expected a whole number ≥ 1, got 0"),
        (
            {"micro_batch": "some"},
            "recovery.micro_batch: expected a whole number ≥ 1 or auto, got 'some'",
        ),
        ({"micro_batch": 5}, "expected a divisor of recovery.batch_size=64, got 5"),
        ({"learning_rate": -1}, "recovery.learning_rate: expected a number > 0, got -1"),
        ({"learning_rate": "1e-4"}, "recovery.learning_rate: expected a number > 0, got '1e-4'"),
        ({"dropout": 1.0}, r"recovery.dropout: expected a number in \[0, 1\), got 1.0"),
        ({"holdout": 1.5}, "recovery.holdout: expected a number ≥ 0, whole or below 1, got 1.5"),
        ({"bf16": "yes"}, "recovery.bf16: expected true, false or auto, got 'yes'"),
        ({"plain": 0}, "expected a weight > 0 in plain, kl or hidden"),
        ({"lora": False, "merge": False}, "recovery.merge: expected true without adapters"),
        (
            {"patience": 2, "holdout": 0},
            "recovery.holdout: expected more than 0 with recovery.patience",
        ),
        ({"patience": 2, "evaluations": 0}, "recovery.evaluations: expected more than 0"),
    ],
)
def test_values_that_cannot_be_meant(values, match):
    with pytest.raises(ConfigError, match=match):
        Recovery(**values)


def test_settings_that_do_not_fit_each_other(tmp_path):
    with pytest.raises(ConfigError, match="stop_on: unknown name 'wiki': did you mean wikitext2"):
        run(
            small(),
            settings(texts(tmp_path), patience=1, stop_on="wiki"),
            tmp_path,
            watch={"wikitext2": float},
        )
    with pytest.raises(ConfigError, match="expected a teacher, the dense model, got none"):
        run(small(), settings(texts(tmp_path), kl=1.0), tmp_path)
    assert callable(prunekit.prune)
