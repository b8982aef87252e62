"""`benchmarks/gpu.py` in small, on the CPU: every part, what a line says, and what goes wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from prunekit.errors import TraceError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FIELDS = {"name", "value", "unit", "measured", "repeats", "device", "command", "revision"}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


@pytest.fixture
def run(gpu, capsys):
    """Run the command: its exit status, and the lines it prints."""

    def run(*arguments):
        status = gpu.main(arguments)
        return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_every_part_runs_in_small(gpu, run):
    status, lines = run("--small")
    assert [line for line in lines if "error" in line] == []
    assert status == 0
    for line in lines:
        assert line.keys() >= FIELDS | {"versions"}, line
        assert line["device"] == "CPU"  # whatever this machine has
        assert "7B" not in line["measured"] or line["name"].endswith(".total")
        assert line["command"] == "python benchmarks/gpu.py --small"
    assert len({line["name"] for line in lines}) == len(lines)
    assert {line["name"].split(".")[0] for line in lines} == set(gpu.PARTS)
    assert all(line["limit"] > 0 for line in lines if line["name"].endswith(".total"))
    figures = {line["name"]: line["value"] for line in lines}
    inside = ("products", "cut", "forward")
    whole = sum(figures[f"pruned.{name}"] for name in ("trace", "schedule", "rest"))
    assert figures["pruned.whole"] == pytest.approx(whole, abs=1e-3)
    schedule = sum(figures[f"pruned.{name}"] for name in inside)
    assert figures["pruned.schedule"] == pytest.approx(schedule, abs=1e-3)
    assert all(figures[f"pruned.{name}"] > 0 for name in inside)  # the functions still exist
    assert figures["pruned.ratio"] == pytest.approx(0.2, abs=0.05)
    assert figures["embedded.difference"] == 0
    ratio = figures["streamed.by_layer"] / figures["streamed.whole"]
    assert figures["streamed.ratio"] == pytest.approx(ratio, rel=0.1)


def test_the_model_of_the_rounding_part_amplifies_rounding(gpu):
    from gpu_parts import amplifying_model, measure_amplification

    ids = torch.randint(2, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    amplified = measure_amplification(amplifying_model(30, 48), ids)
    assert amplified > 20 * torch.finfo(torch.bfloat16).eps


def test_a_part_that_fails_does_not_stop_the_others(gpu, run, monkeypatch):
    def fails(bench):
        bench.figure("fails.first", 1.0, "s", "something")
        raise ValueError("no such luck\nat all")

    def never_ends(bench):
        while True:
            try:
                time.sleep(0.01)
            except Exception:  # as a run may do on its way
                pass

    def works(bench):
        bench.figure("works.first", 2, "s", "something")

    parts = {
        "fails": gpu.Part(fails, 10, "fails"),
        "never_ends": gpu.Part(never_ends, 0.2, "never ends"),
        "works": gpu.Part(works, 10, "works"),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    status, lines = run("--small", "--only", "fails", "never_ends", "works")
    assert status == 1
    assert [line["name"] for line in lines] == [
        "fails.first",
        "fails",
        "fails.total",
        "never_ends",
        "never_ends.total",
        "works.first",
        "works.total",
    ]
    assert lines[1]["error"] == "ValueError: no such luck"
    assert lines[3]["error"] == "OutOfTime: longer than 0.2 s"
    assert run("--small", "--only", "works")[0] == 0


def test_an_unknown_part_and_a_missing_gpu_are_named(gpu, capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        gpu.main(["--small", "--only", "prefill", "speed"])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert f"--only: unknown speed; parts: {', '.join(gpu.PARTS)}" in said.err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main(["--only", "prefill"])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert "needs a CUDA GPU, and there is none here; --small runs on a CPU" in said.err


def test_the_parts_fit_into_the_time_of_the_whole(gpu, run, monkeypatch):
    """On a GPU a part gets at most what the parts before it have left."""
    limits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "TOTAL", 30)
    monkeypatch.setattr(gpu, "run_part", lambda *arguments: limits.append(arguments[-1]) or True)
    monkeypatch.setattr(gpu.time, "perf_counter", iter(range(0, 1000, 10)).__next__)
    gpu.main(["--only", "pruned", "residual", "streamed"])
    assert limits == [30, 20, 10]


def test_a_job_that_fails_or_kills_its_process_costs_no_other_one(monkeypatch, tmp_path):
    body = "import os\n\ndef work(job):\n    return {'is': eval(job['do']), 'by': os.getpid()}\n"
    (tmp_path / "eager.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from eager import work
    from workers import spread

    jobs = [{"do": text} for text in ("1", "1 / 0", "2", "os._exit(1)", "3", "4")]
    results = {job["do"]: result for job, result in spread(jobs, work, 1)}
    assert results["1 / 0"] == {"error": "ZeroDivisionError: division by zero"}
    assert results["os._exit(1)"] == {"error": "its process died"}
    assert [results[text]["is"] for text in "1234"] == [1, 2, 3, 4]
    assert results["3"]["by"] == results["4"]["by"] != results["2"]["by"] != results["1"]["by"]


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    """Its output ends only when no process holds it any more."""
    body = """
import os, sys, time

def work(job):
    print("at work", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import workers
    list(workers.spread([{}], work, 1))
"""
    (tmp_path / "parent.py").write_text(body)
    command = [sys.executable, tmp_path / "parent.py", BENCHMARKS]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"at work\n"
        parent.kill()
        assert parent.communicate(timeout=60) == (b"", None)


def test_runs_of_the_search_come_by_what_they_say_and_their_file_survives(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import search
    import workers

    runs = search.plan("m", [0.2, 0.33, 0.5], search.POLICIES, ["search x=1"], [0, 1])
    keys = [tuple(run[key] for key in search.KEY) for run in runs]
    assert len(set(keys)) == len(keys) == 3 * 6 * 2 + 2
    names = [f"{run['policy']} {run['ratio']} {run['seed']}" for run in runs]
    assert names[:4] == [f"{p} 0.2 0" for p in ("search", "uniform", "log_increase")] + [
        "linear_increase 0.2 0"
    ]
    assert names[8:10] == ["search x=1 0.2 0", "search x=1 0.33 0"]
    assert names[10] == "search 0.2 1" and names[-1] == "owl 0.5 1"

    def spread(jobs, *how):
        for job in jobs[:2]:
            yield job, {"error": "x"} if job is jobs[1] else {"pruned": 2.0}

    monkeypatch.setattr(workers, "spread", spread)
    path = tmp_path / "runs.jsonl"
    path.write_text('{"model": "m", "rat')  # of a process that was killed
    runs = [{**run, "options": ["model.path=/somewhere/m"]} for run in runs]
    assert not workers.make_rows(runs, search.run, path, 1)
    rows = workers.read_rows(path, search.KEY)
    assert list(rows) == [keys[0]] and rows[keys[0]]["options"] == ["model.path=m"]


def test_a_search_is_compared_on_its_own_draws_and_under_its_own_options(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from page import _increase_of_others

    found = {
        "search": [(0, 14.0), (1, 15.0)],
        "search groups=mlp policy.rounds=1": [(0, 13.0)],
        "uniform": [(0, 20.0), (1, 12.0)],
        "owl": [(0, 14.5)],
        "uniform groups=mlp": [(0, 14.0), (1, 11.0)],
    }
    runs = {
        name: [{"seed": seed, "dense": 10.0, "pruned": pruned} for seed, pruned in rows]
        for name, rows in found.items()
    }
    least = {name: _increase_of_others(name, rows, runs) for name, rows in runs.items()}
    assert least["search"] == 6.0  # of uniform: owl has one of its draws alone
    assert least["search groups=mlp policy.rounds=1"] == 4.0


def test_rows_are_kept_as_they_end_and_a_run_stops_in_time(monkeypatch, tmp_path):
    body = "import time\n\ndef work(job):\n    return {'is': eval(job['do'])}\n"
    (tmp_path / "timed.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from timed import work
    from workers import make_rows, read_rows

    texts = ("1", "time.sleep(60)", "2")
    jobs = [{"do": text, "options": ["a=[/folder/one,/folder/two]", "b=1"]} for text in texts]
    began = time.monotonic()
    assert make_rows(jobs, work, tmp_path / "rows", 1, seconds=3.0)
    assert time.monotonic() - began < 20
    assert len((tmp_path / "rows").read_text().splitlines()) == 1
    expected = {"do": "1", "is": 1, "options": ["a=one,two", "b=1"]}
    assert read_rows(tmp_path / "rows", ["do"]) == {("1",): expected}


def test_the_most_important_runs_of_gates_come_first_and_all_are_in_the_table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gates
    import page

    monkeypatch.setattr(gates, "environment", lambda _: {"revision": "none"})
    jobs = gates.list_jobs(gates.parse(["--runs", "rows"]), {("demo", 0.5, "slimgpt", 0)})
    assert len(jobs) == 2 * 3 * len(gates.METHODS) - 1
    first = 2 * len(gates.METHODS) - 1
    assert {job["seed"] for job in jobs[:first]} == {0} != {job["seed"] for job in jobs[first:]}
    assert {job["method"] for job in jobs[-12:]} == {*gates.TUNED, "search"}
    compute = {"perplexity": {"held out": 20.0}, "seconds": 1.0, "forward": 5, "trained": 10}
    stages = {name: {**compute, "rows": 7} for name in ("pruned", "recovered", "equal")}
    rows = [{**job, **stages, "dense": {"held out": 10.0}, "device_name": "CPU"} for job in jobs]
    text = "\n".join(
        page.gates({**page.environment("gates"), "note": "", "repeats": 1, "rows": rows})
    )
    assert "| search | 3 | 20.00 ± 0.00 |" in text and text.count("| slimgpt |") == 2
    # Training gates costs 2 × 16,384 + 3 × 102,400 tokens; a row of recovery 256.
    assert gates.spare(jobs[0], {"forward": 20_480, "trained": 0}) == 1248


def test_types_of_models_are_tried(monkeypatch):
    """One that holds entirely, and one that can't be traced."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import family_trial
    import page
    import tiny_models

    monkeypatch.setattr(family_trial, "METHODS", ("magnitude",))
    rows = [family_trial.try_type("qwen2")]

    def refuses(model, batch, *check):
        raise TraceError("no rule for it")

    monkeypatch.setattr(family_trial, "trace_batch", refuses)
    rows.append(family_trial.try_type("mamba"))
    assert [row["verdict"] for row in rows] == ["holds", "refused"], rows
    assert rows[0]["cut"]["magnitude"]["kinds"].keys() == {"attention", "mlp"}
    assert "no rule for it" in rows[1]["steps"]["trace"]
    assert len(tiny_models.TYPES) > 150
    text = "\n".join(
        page.families({**page.environment("families"), "note": "", "rows": rows, "repeats": 1})
    )
    assert "1 holds, 1 refused" in text and "no rule for it" in text


def test_the_page_names_the_part_that_measures_each_row(gpu):
    """Rows of two tables, whose second column is the part."""
    text = (BENCHMARKS.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    named = {row[1].strip().strip("`") for row in rows} - {"part"}
    assert named == set(gpu.PARTS)


@pytest.fixture
def papers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import papers

    return papers


def test_the_papers_figures_are_those_of_runs_that_their_experiments_make(papers):
    names = papers.experiments()
    assert len(names) == 31
    for name in names:
        text = (papers.FOLDER / f"paper_{name}.yaml").read_text()
        params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
        values = {key: str(each).split(",") for key, each in params.items()}
        about, figure, rows = papers.read_experiment(name)
        assert about.startswith(("LLM-Pruner, ", "SlimGPT, "))
        assert bool(figure) == bool(rows), name
        for choice, value in rows:
            assert float(value) > 0
            for part in choice.removeprefix("dense").split():
                key, _, chosen = part.partition("=")
                assert chosen in values[key], f"{name}: {part}"


def test_experiments_that_share_small_runs_differ_in_model_and_evaluation_alone(papers):
    def settings(name):
        read = yaml.safe_load((papers.FOLDER / f"paper_{name}.yaml").read_text())
        chosen = {key: value for choice in read.pop("defaults") for key, value in choice.items()}
        own = ("override /model", "override /eval", "hydra", "eval")
        return {key: part for key, part in (chosen | read).items() if key not in own}

    for name, base in papers.SAME.items():
        assert settings(name) == settings(base), name
        swept, shared = (papers.read_settings(each)[0] for each in (name, base))
        for key in swept.keys() - {"model"}:
            assert set(swept[key]) <= set(shared[key]), f"{name}: {key}"
        assert base not in papers.SAME


def test_every_experiment_has_small_runs(papers):
    tables = json.loads((BENCHMARKS / "papers.json").read_text())["tables"]
    for name in papers.experiments():
        ours = papers.runs_of(name, tables)
        assert ours, name
        for choice, _ in papers.read_experiment(name)[2]:
            if choice.startswith("recovery=none") or choice.endswith("recovery=none"):
                assert any(papers.matches(choice, run["choice"]) for run in ours), choice
        for arguments in papers.small_sweeps(name, Path("folder")):
            assert "model=demo" in arguments and len({*arguments}) == len(arguments)


def test_the_page_of_the_papers_is_up_to_date(papers, monkeypatch, tmp_path):
    monkeypatch.setattr(papers, "PAGE", tmp_path / "page.md")
    papers.write_page(json.loads((BENCHMARKS / "papers.json").read_text()))
    page = BENCHMARKS.parent / "docs" / "paper-tables.md"
    assert (tmp_path / "page.md").read_text() == page.read_text()
    assert page.read_text().count("\n## ") == 31
