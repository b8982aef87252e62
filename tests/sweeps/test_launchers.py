"""The launchers and the sweeper of `prunekit[sweeps]`; without these packages, skipped.

Runs in other processes fail at their configuration, which imports no torch: that their errors come
back as rows is what a launcher has to bring about.
"""

import math

import pytest
from sweep_helpers import only_report, rows_of, sweep


@pytest.fixture
def runs(monkeypatch):
    return only_report(monkeypatch)


def check_failures(done, folder):
    assert done.returncode == 2, done.stderr
    assert "2 runs, 2 failed" in done.stdout
    rows = rows_of(folder)
    assert [row["folder"] for row in rows] == ["000_ratio-1.5", "001_ratio-1.6"]
    errors = [f"ratio: expected a number in (0, 1), got {ratio}" for ratio in (1.5, 1.6)]
    assert [row["error"] for row in rows] == errors


def test_joblib_brings_the_rows_of_its_processes(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    options = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = sweep("ratio=1.5,1.6", *options, cwd=tmp_path)
    check_failures(done, tmp_path / "sweep")


def test_two_processes_of_submitit_work_on_each_run(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    options = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    done = sweep("ratio=1.5,1.6", *options, cwd=tmp_path)
    check_failures(done, tmp_path / "sweep")
    for rank, name in enumerate(["prunekit: ", "prunekit, process 1: "]):
        logs = list((tmp_path / "sweep" / ".submitit").rglob(f"*_{rank}_log.err"))
        assert len(logs) == 2
        assert all(f"{name}ratio: expected" in log.read_text() for log in logs)


def test_ray_brings_the_rows_of_its_cluster(tmp_path):
    reason = "ray is missing: pip install hydra-ray-launcher, a large package that `dev` is without"
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason=reason)
    options = ["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"]
    done = sweep("ratio=1.5,1.6", *options, cwd=tmp_path)
    check_failures(done, tmp_path / "sweep")


OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.sampler.seed=0"]


def test_optuna_is_told_the_figures_and_repeats_no_run(runs, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    asked, _ = runs
    trials = ["hydra.sweeper.n_trials=5", "hydra.sweeper.max_failure_rate=1"]
    done = sweep(*OPTUNA, *trials, "ratio=choice(0.2,0.3,0.5)", cwd=tmp_path)
    assert done.returncode == (2 if 0.5 in asked else 0)
    finished = [ratio for ratio in asked if ratio != 0.5]
    assert len(set(finished)) == len(finished), "a run that is done is not run again"
    text = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    best = float(text.partition("best_value:")[2])
    assert best == pytest.approx(math.exp((9 + 3 * min(finished)) / 2))
    assert len(rows_of(tmp_path / "sweep")) == len(set(asked))


def test_optuna_weighs_two_figures(runs, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    both = ["objective=[parameters,perplexity.a]", "hydra.sweeper.direction=[minimize,minimize]"]
    ratios = "ratio=interval(0.1,0.3)"
    done = sweep(*OPTUNA, *both, "hydra.sweeper.n_trials=2", ratios, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert text.count("params:") == 2, "of two ratios none beats the other in both figures"
