"""The commands a user types; one run, the help and what ends badly as processes of their own."""

import csv
import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DATA, command_line
from processes import COMMAND, Python, run_python
from report_schema import read_report

import prunekit
from prunekit import cli
from prunekit.demo import DEMO_MODEL

QUICK = [
    "data.calibration.samples=8",
    "data.calibration.sequence_length=64",
    "eval.max_tokens=2048",
    "eval.speed=false",
    "eval.new_tokens=4",
    "eval.temperature=0",
    "eval.layer_tokens=256",
]


def prunekit_command(*arguments, cwd, **kwargs):
    command = [sys.executable, "-m", "prunekit", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200, **kwargs)


def fails(*arguments, cwd, match):
    done = command_line(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert match in lines[0]
    assert not list(Path(cwd).rglob("out"))


# The command, and then the names of all that it imported.
_LIST_IMPORTS = """
import sys
from prunekit.cli import main
sys.argv = ["prunekit", *sys.argv[1:]]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def test_help_imports_nothing_slow_and_lists_what_is_needed_first(tmp_path):
    command = [sys.executable, "-c", _LIST_IMPORTS, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0
    slow = {"torch", "transformers", "lm_eval", "datasets", "peft", "matplotlib", "pandas"}
    assert not slow & set(done.stderr.split())
    for word in (
        "slimgpt",
        "llm_pruner",
        "log_increase",
        "window",
        "ratio=",
        "output_dir=",
        "data.calibration.path=",
    ):
        assert word in done.stdout


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["ratio=1.5"]])
def test_what_is_found_in_the_configuration_takes_no_import(tmp_path, arguments):
    command = [sys.executable, "-c", _LIST_IMPORTS, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == (0 if arguments[0] == "--cfg" else 2)
    assert not {"torch", "transformers"} & set(done.stderr.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    noted = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = prunekit_command(*QUICK, "ratio=0.2", "output_dir=result", cwd=folder, env=noted)
    assert done.returncode == 0, done.stderr
    (folder / "imports").write_text(done.stderr)
    return folder / "result", done.stdout


def test_a_run_imports_what_it_uses(finished):
    lines = (finished[0].parent / "imports").read_text().splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if "import time:" in line}
    assert {"torch", "transformers", "matplotlib"} <= imported
    others = {"lm_eval", "datasets", "peft", "pandas", "torch_pruning", "onnx", "gguf", "evaluate"}
    assert not others & imported


def test_a_run_leaves_the_folder_of_the_design(finished):
    folder, output = finished
    assert {path.name for path in folder.iterdir()} == {
        *("model", "plan.json", "report.json", "report.md", "report.html", ".hydra"),
        *("layers.svg", "ratio.svg", "error.svg"),
    }
    report = read_report(folder)
    assert {
        "method",
        "seed",
        "versions",
        "ratio",
        "parameters",
        "perplexity",
        "layers",
        "seconds",
    } <= report.keys()
    assert report["steps"] == {"attention": 1, "mlp": 32}
    half_a_step = 32 * 3 * 256 / 2 / report["parameters"]["dense"]
    assert report["ratio"]["achieved"] == pytest.approx(0.2, abs=half_a_step)
    assert (
        report["perplexity"]["embedded"]["pruned"] > report["perplexity"]["embedded"]["dense"] > 1
    )
    assert len(report["layers"]) == 8
    assert report["layers"][3]["attention"]["total"] == 8
    assert set(report["seconds"]) == set(report["peak_memory_bytes"])
    assert "prunekit.from_pretrained('result/model')" in output
    assert "perplexity, embedded" in output
    assert "layers.3.mlp: 640 → " in output


def test_the_saved_model_is_the_reported_one_and_small(finished):
    folder, _ = finished
    report = read_report(folder)
    model = prunekit.from_pretrained(folder / "model")
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]["pruned"]
    assert model.dtype == torch.float16, "stored as the checkpoint was"
    ratio = (folder / "model" / "model.safetensors").stat().st_size / (
        DEMO_MODEL / "model.safetensors"
    ).stat().st_size
    assert ratio == pytest.approx(0.8, abs=0.01)


def test_the_api_gives_the_same_plan(finished):
    from prunekit.checkpoint import load_tokenizer
    from prunekit.data.corpora import load_corpus
    from prunekit.data.tokens import calibration_windows

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = prunekit.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    documents = load_corpus("embedded", "calibration", {})
    tokens = calibration_windows(documents, load_tokenizer(DEMO_MODEL), 8, 64, 0)
    result = prunekit.prune(model, ratio=0.2, calibration=tokens)
    assert prunekit.PruningPlan.from_json((finished[0] / "plan.json").read_text()) == result.plan
    assert result.plan.fingerprint == result.graph.fingerprint


def test_an_output_folder_with_files_is_refused_and_kept(finished):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = command_line(*QUICK, "output_dir=result", "ratio=0.5", cwd=folder.parent)
    assert done.returncode == 2
    assert "exists and is not empty" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_sweep_runs_every_combination(short_model, tmp_path):
    done = command_line(
        "-m",
        f"model.path={short_model}",
        "method=magnitude,random",
        "ratio=0.1,0.3",
        *QUICK,
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
        draws=True,
    )
    assert done.returncode == 0, done.stderr
    reports = [read_report(path.parent) for path in (tmp_path / "sweep").rglob("report.json")]
    assert {(r["method"], r["ratio"]["target"]) for r in reports} == {
        (method, ratio) for method in ("magnitude", "random") for ratio in (0.1, 0.3)
    }
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()))
    for row, report in zip(rows, sorted(reports, key=lambda r: r["command"]), strict=True):
        assert (row["method"], row["ratio"]) == (report["method"], str(report["ratio"]["target"]))
        assert int(row["parameters"]) == report["parameters"]["pruned"]
        assert float(row["perplexity.embedded"]) == report["perplexity"]["embedded"]["pruned"]
        folder = tmp_path / "sweep" / row["folder"]
        assert read_report(folder) == report
    assert 'aria-label="Points' in (tmp_path / "sweep" / "sweep.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["ratio=1.5"], "ratio: expected a number in (0, 1), got 1.5"),
        (["method=slim"], "method: unknown choice 'slim': did you mean slimgpt"),
        (["model.paht=x"], "paht"),
    ],
)
def test_mistakes_found_at_once(tmp_path, arguments, match):
    fails(*arguments, "output_dir=out", cwd=tmp_path, match=match)


def test_missing_model_and_corpus(tmp_path):
    fails(
        "model.path=./nowhere",
        "output_dir=out",
        cwd=tmp_path,
        match="./nowhere: no such model folder",
    )
    (tmp_path / "short.txt").write_text("import os")
    fails(
        "data.calibration.path=short.txt",
        "output_dir=out",
        cwd=tmp_path,
        match="one window needs 128 (sequence_length)",
    )


@pytest.mark.parametrize("target", ["afile", "afile/out", "x" * 300])
def test_an_output_folder_that_cannot_be(tmp_path, target):
    (tmp_path / "afile").write_text("x")
    fails(*QUICK, "eval=none", f"output_dir={target}", cwd=tmp_path, match="output_dir")


def test_a_result_can_be_pruned_again_from_the_command_line(finished, tmp_path):
    done = command_line(
        f"model.path={finished[0] / 'model'}", "output_dir=out", "ratio=0.1", *QUICK, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    first, again = (read_report(f) for f in (finished[0], tmp_path / "out"))
    assert again["parameters"]["dense"] == first["parameters"]["pruned"]
    assert again["perplexity"]["embedded"]["dense"] == pytest.approx(
        first["perplexity"]["embedded"]["pruned"], rel=1e-4
    )


def test_trace_lists_the_groups_and_draws_a_layer(tmp_path):
    import networkx

    done = command_line("task=trace", "output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "layers.3.self_attn" in done.stdout
    assert "vocabulary" in done.stdout
    graph = networkx.read_graphml(tmp_path / "out" / "graph.graphml")
    assert graph.nodes["layers.3.mlp"]["units"] == 640
    assert graph.has_edge("layers.3.mlp", "model.layers.3.mlp.down_proj.weight[1]")
    assert (tmp_path / "out" / "layer.svg").read_text().startswith("<?xml")


def test_out_of_reach(tmp_path):
    fails(*QUICK, "ratio=0.99", "output_dir=out", cwd=tmp_path, match="can remove at most")
    done = command_line(*QUICK, "eval=none", "output_dir=out", cwd=tmp_path)
    assert done.returncode == 0, "the folder of a run that failed can be used again"


def test_an_error_of_the_program_leaves_no_empty_folder(tmp_path):
    script = "import prunekit.jobs as jobs; jobs.run = lambda *_: 1 / 0; "
    done = run_python(script + COMMAND, "output_dir=out", cwd=tmp_path)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert not (tmp_path / "out").exists()


_UNBUFFERED = "import sys; sys.stdout.reconfigure(line_buffering=True); "


def test_interrupted_runs_leave_no_model(tmp_path):
    python = Python(_UNBUFFERED + COMMAND, *QUICK, "eval=none", "output_dir=out", cwd=tmp_path)
    until = time.monotonic() + 60
    first_group = re.compile(r"units.*→|→.*units")
    while not first_group.search(python.read()) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(python.process.pid, signal.SIGINT)
    done = python.finish()
    assert done.returncode == 130
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(
        "prunekit: interrupted; no result was written; what was finished is kept"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".state"]


def test_a_disk_that_fills_leaves_no_model(tmp_path):
    """A file-size limit of 1 MB stands in for the full disk: the weights need 10."""
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
    )
    done = run_python(script + COMMAND, "eval=none", "output_dir=out", *QUICK, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "can't be written" in done.stderr.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        ".state"
    ]  # what was finished is not lost


def test_real_checkpoint_from_the_command_line(data, tmp_path):
    stories = DATA.resolve() / "tinystories" / "stories.jsonl"
    done = command_line(
        f"model.path={DATA.resolve() / 'models' / 'stories260K'}",
        f"data.calibration.path={stories}",
        f"eval.corpora=[{stories}]",
        "eval.prompts=[Once upon a time]",
        "output_dir=out",
        "data.calibration.samples=32",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "out")
    assert report["perplexity"]["stories"]["pruned"] < 12


def test_garbage_is_looked_for_again_whatever_happens_while_it_is_not():
    assert gc.isenabled()
    with pytest.raises(ImportError), cli._without_collecting():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
