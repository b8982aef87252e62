"""Sweeps with runs that only write a report: names, rows, failures, what resume=true does."""

import base64
import csv
import hashlib
import json
import math
import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from sweep_helpers import only_report, report_of, rows_of, sweep

from prunekit.errors import CheckpointError, ConfigError
from prunekit.sweeps import Record, figures_of, objective_of
from prunekit.sweeps.index import Line, to_csv
from prunekit.sweeps.naming import folder_name, swept_keys, values_of
from prunekit.sweeps.page import render_page
from prunekit.sweeps.picture import Point, front_of


@pytest.fixture
def runs(monkeypatch):
    return only_report(monkeypatch)


def test_each_run_is_a_row_and_failures_do_not_end_a_sweep(runs, tmp_path):
    done = sweep("ratio=0.1,0.5,0.6,0.3", cwd=tmp_path)
    assert done.returncode == 2
    assert "corpus: <nothing> there" in done.stderr
    assert "ZeroDivisionError" in done.stderr
    assert "4 runs, 2 failed" in done.stdout
    rows = rows_of(tmp_path / "sweep")
    assert [row["ratio"] for row in rows] == ["0.1", "0.5", "0.6", "0.3"]
    assert [row["status"] for row in rows] == ["done", "failed", "failed", "done"]
    assert [row["error"] for row in rows] == ["", "corpus: <nothing> there", "a bug", ""]
    assert [row["folder"] for row in rows] == [
        *("000_ratio-0.1", "001_ratio-0.5", "002_ratio-0.6", "003_ratio-0.3"),
    ]
    assert float(rows[3]["perplexity.a"]) == pytest.approx(math.exp(3.3))
    assert float(rows[3]["perplexity"]) == pytest.approx(math.exp((3.3 + 6.6) / 2))
    assert rows[3]["parameters"] == "700"
    assert rows[1]["parameters"] == ""
    left = {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert left == {".sweep", "000_ratio-0.1", "003_ratio-0.3"}


def test_resume_does_what_is_missing_of_a_sweep_that_has_grown(runs, tmp_path):
    asked, broken = runs
    sweep("ratio=0.1,0.5", cwd=tmp_path)
    assert asked == [0.1, 0.5]
    refused = sweep("ratio=0.1,0.5", cwd=tmp_path)
    assert refused.returncode == 2
    assert "holds a sweep" in refused.stderr
    assert len(asked) == 2
    broken.clear()
    done = sweep("ratio=0.1,0.2,0.5", "resume=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert asked == [0.1, 0.5, 0.2, 0.5], "the one that was done is not done again"
    rows = rows_of(tmp_path / "sweep")
    assert {row["status"] for row in rows} == {"done"}
    assert sorted(row["folder"] for row in rows) == [
        *("000_ratio-0.1", "001_ratio-0.2", "001_ratio-0.5"),
    ]


def test_an_interrupted_run_is_a_row(runs, tmp_path):
    runs[1][0.2] = KeyboardInterrupt()
    done = sweep("ratio=0.1,0.2,0.3", cwd=tmp_path)
    assert done.returncode == 130
    assert [row["status"] for row in rows_of(tmp_path / "sweep")] == ["done", "interrupted"]


def test_a_task_list_and_six_keys_make_a_short_name_that_needs_no_quotes():
    tasks = ",".join(f"task_number_{n}" for n in range(40))
    overrides = [f"eval.tasks=[{tasks}],[]", "a/b=x,y", "model.path=/models/big one,/models/c"]
    overrides += [f"data.calibration.{key}=1,2" for key in ("samples", "seed", "batch_size")]
    keys = swept_keys([*overrides, "ratio=0.5"], {"ratio": "0.1,0.2", "policy.seed": "1,2"})
    assert "ratio" not in keys, "the command line has given it one value"
    assert len(keys) == 7
    run = [f"eval.tasks=[{tasks}]", "a/b=x", "model.path=/models/c", "data.calibration.seed=2"]
    name = folder_name(12, values_of(run, keys))
    assert len(name.encode()) <= 80
    assert name.startswith("012_")
    parsed = OverridesParser.create().parse_override(f"output_dir=sweep/{name}")
    assert parsed.value() == f"sweep/{name}"
    assert not parsed.is_sweep_override()
    assert re.fullmatch(r"[\w.+-]+", name)
    same_end = folder_name(0, {"policy.seed": "1", "data.calibration.seed": "2", "ratio": "0.5"})
    assert same_end == "000_policy.seed-1_data.calibration.seed-2_ratio-0.5"


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_front_holds_what_no_other_beats(pairs):
    points = [Point(number=n, price=x, perplexity=y) for n, (x, y) in enumerate(pairs)]
    beaten = {
        (x, y) for x, y in pairs for a, b in pairs if (a <= x and b <= y and (a, b) != (x, y))
    }
    assert {(p.price, p.perplexity) for p in front_of(points)} == set(pairs) - beaten


def line_of(number, ratio, **changes):
    values = {"ratio": str(ratio), "method": "<b>&"}
    record = Record(number=number, folder=f"00{number}_a b", overrides=(), values=values, **changes)
    report = report_of(ratio)
    figures = figures_of(report) if record.status == "done" else {}
    return Line(record=record, figures=figures, dense=figures_of(report, "dense"))


def test_the_page_sorts_by_its_own_script_alone_and_escapes_text():
    lines = [line_of(0, 0.1, status="done"), line_of(1, 0.2, status="failed", error="<script>")]
    page = render_page(lines, "my sweep")
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "&lt;script&gt;" in page
    assert "<b>&" not in page
    assert 'href="000_a%20b/report.html"' in page
    assert 'aria-label="Points, the perplexity of each run: by parameters, no run beats 0."' in page
    assert page.count("<tr>") == 3
    assert 'data-sort="900.0"' in page


def test_the_table_has_a_line_for_each_run_with_the_figures_that_it_has():
    text = to_csv([line_of(0, 0.1, status="done"), line_of(1, 0.2, status="running")])
    first, second = csv.DictReader(text.splitlines())
    assert float(first["removed"]) == 0.1
    assert (second["status"], second["removed"], second["method"]) == ("running", "", "<b>&")


def test_a_search_is_told_the_figures_that_it_asks_for(tmp_path):
    (tmp_path / "report.json").write_text(report_of(0.4).to_json())
    assert objective_of(tmp_path, "perplexity") == pytest.approx(math.exp((3.4 + 6.8) / 2))
    assert objective_of(tmp_path, ["parameters", "perplexity.a"]) == pytest.approx(
        (600, math.exp(3.4))
    )
    with pytest.raises(ConfigError, match="objective: no figure 'perplexty': did you mean"):
        objective_of(tmp_path, "perplexty")


def test_a_record_that_was_written_is_read_again(tmp_path):
    from prunekit.sweeps import Records

    records = Records(tmp_path)
    kept = line_of(3, 0.2, status="failed", error="e", seconds=1.5).record
    records.write(kept)
    assert records.all() == [kept]
    assert records.find(()) == kept
    assert records.find(("ratio=0.5",)) is None
    (file,) = (tmp_path / ".sweep").glob("*.json")
    assert json.loads(file.read_text())["error"] == "e"
    file.write_text(file.read_text()[:40])
    with pytest.raises(CheckpointError, match=f"{file.name}: expected the record of a run"):
        records.all()
