"""`Report`: the same JSON in and out, a schema that holds what runs write and refuses the rest."""

import copy
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from report_schema import violations
from test_report import make

from prunekit.errors import DataError
from prunekit.report import Report, schema
from prunekit.report.parts import KeptUnits, LayerKept, Ratio

# The keys of report.json in the order that each task has always written them in.
ORDER = {
    "prune": (
        "task seed command versions method ratio parameters target policy layers seconds "
        "peak_memory_bytes activation_bytes base calibration float64 recovery models weight_bytes "
        "macs macs_protocol macs_by_module perplexity tasks layer_error warnings samples "
        "evaluation_bytes latency"
    ),
    "evaluate": (
        "task seed command versions model models parameters weight_bytes macs macs_protocol "
        "macs_by_module perplexity tasks layer_error warnings samples evaluation_bytes latency "
        "seconds peak_memory_bytes"
    ),
    "recover": (
        "task seed command versions base method ratio target policy layers calibration recovery "
        "models parameters weight_bytes macs macs_protocol macs_by_module perplexity tasks "
        "layer_error warnings samples evaluation_bytes latency seconds peak_memory_bytes"
    ),
}


def whole(task):
    """A report with every key that the task may write."""
    plain = make() | {
        "task": task,
        "model": "a/folder",
        "base": None,
        "ratio": {"target": None, "achieved": 0.1},
        "target": {"measure": "bytes", "limit": 9, "dense": 12, "achieved": 8, "measured": 0.25},
        "calibration": {"corpus": "c4", "samples": 8, "sequence_length": 128, "seed": 0},
        "float64": {"model.layers.0.mlp": 1},
        "activation_bytes": {"device": 0, "host": 4096, "file": 0},
    }
    plain["policy"]["outliers"] = {"model.layers.0.mlp": 0.5}
    plain["layers"].append({"index": None, "conv": {"kept": 3, "total": 4}})
    return {key: plain[key] for key in ORDER[task].split()}


@pytest.mark.parametrize("task", ORDER)
def test_the_json_of_every_task_goes_through_unchanged(task):
    plain = whole(task)
    report = Report.from_plain(plain)
    assert json.dumps(dict(report)) == json.dumps(plain), "keys, order and nulls included"
    assert Report.from_json(report.to_json()) == report == plain
    assert violations(plain, schema()) == []


def test_parts_are_read_as_the_mapping_they_are_and_as_dataclasses():
    report = Report.from_plain(whole("prune"))
    assert report["ratio"]["achieved"] == report.ratio.achieved == 0.1
    assert report.get("ratio") == {"target": None, "achieved": 0.1}
    assert "ratio" in report and "model" not in report and "nothing" not in report
    assert report.get("model", "none") == "none"
    with pytest.raises(KeyError):
        report["model"]
    assert report.layers[0].kinds["mlp"] == KeptUnits(**report["layers"][0]["mlp"])
    assert {**report} == report


def test_nulls_are_written_beside_the_key_they_belong_to():
    assert dict(Report(method="slimgpt")) == {"method": "slimgpt"}
    assert dict(Report(task="prune")) == {"task": "prune", "command": None}
    assert "base" not in Report(task="recover")


def test_merging_replaces_parts_and_keeps_the_others():
    first = Report(method="random", parameters={"dense": 4, "pruned": 3})
    second = Report(parameters={"dense": 4, "pruned": 3, "recovered": 3}, models=("dense",))
    both = first.merge(second)
    assert (both.method, both.parameters, both.models) == ("random", second.parameters, ("dense",))
    assert replace(both, seed=3).seed == 3 and both.seed is None


def test_what_is_kept_of_the_pruning_once_a_model_is_recovered():
    kept = Report.from_plain(whole("prune")).pruning_part()
    assert set(kept) == {"method", "ratio", "target", "policy", "layers", "base", "calibration"}


def broken(change):
    plain = copy.deepcopy(whole("prune"))
    change(plain)
    return plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(surprise=1), "report: unknown key 'surprise'"),
        (lambda p: p.update(seed="0"), "report.seed: expected a JSON integer, got '0'"),
        (lambda p: p.update(seed=True), "report.seed: expected a JSON integer, got True"),
        (lambda p: p.update(warnings="w"), "report.warnings: expected a JSON array, got 'w'"),
        (lambda p: p.update(ratio=[]), r"report.ratio: expected a JSON object, got \[\]"),
        (lambda p: p["ratio"].pop("achieved"), "report.ratio: expected the key achieved"),
        (lambda p: p["layers"][2]["mlp"].pop("kept"), r"report.layers\[2\].mlp: expected the key"),
        (lambda p: p["tasks"]["piqa"]["dense"].update(value="x"), "report.tasks.piqa.dense.value"),
    ],
)
def test_what_is_no_report_is_refused_by_place(change, message):
    plain = broken(change)
    with pytest.raises(DataError, match=message):
        Report.from_plain(plain)
    assert violations(plain, schema()) != [], "by the schema too"


def test_what_is_no_json_is_refused():
    with pytest.raises(DataError, match="report: not JSON"):
        Report.from_json("{")
    with pytest.raises(ValueError, match="not JSON compliant"):
        Report(ratio=Ratio(target=0.1, achieved=float("nan"))).to_json()


def test_the_schema_describes_every_key():
    described = schema()
    assert described["properties"].keys() == {own.name for own in fields(Report)}
    parts = [described, *described["$defs"].values()]
    for part in parts:
        assert part["description"].endswith(".") or "`" in part["description"]
        assert all("description" in own for own in part["properties"].values())
    assert LayerKept.__name__ in described["$defs"]


def test_the_schema_in_the_docs_is_the_one_of_the_code():
    """`make docs` writes it."""
    file = Path(__file__).parents[2] / "docs" / "report.schema.json"
    assert json.loads(file.read_text()) == schema()
