"""One model's column, and columns side by side as the report has them."""

import json

import pytest
import torch

from prunekit.evaluation.comparison import Comparison
from prunekit.evaluation.cost import Macs
from prunekit.evaluation.evaluation import Evaluation
from prunekit.evaluation.generation import Continuation, Drawing
from prunekit.evaluation.task_scores import TaskScore


def column(scale, odd=()):
    score = TaskScore(value=scale, metric="acc", stderr=None, samples=8, fewshot=0, group="mmlu")
    return Evaluation(
        parameters=10,
        weight_bytes=20,
        perplexity={"text": scale},
        tasks={"mmlu_anatomy": score},
        macs=Macs(total=7, by_module={"lm_head": 7}),
        samples=(Continuation(prompt="a", mode=str(Drawing()), text=f"a {scale}"),),
        outputs={index: torch.full((2, 3), scale) for index in range(3)},
        odd_widths={8: frozenset(odd), 64: frozenset(odd)},
    )


def compare(**columns):
    comparison = Comparison(columns=columns, macs_tokens=4, protocols={"text": "how"})
    report = comparison.to_json()
    assert json.loads(json.dumps(report)) == report
    return report


def test_an_evaluation_is_plain_json_without_its_outputs():
    figures = column(2.0, odd=("b", "a")).to_json()
    assert json.loads(json.dumps(figures)) == figures
    assert figures["odd_widths"] == {"8": ["a", "b"], "64": ["a", "b"]}
    assert figures["tasks"]["mmlu_anatomy"]["of"] == "mmlu"
    assert figures["macs"] == {"total": 7, "by_module": {"lm_head": 7}}
    assert "outputs" not in figures
    assert Evaluation(parameters=1, weight_bytes=4).to_json()["macs"] is None


def test_columns_stand_side_by_side():
    report = compare(dense=column(2.0), pruned=column(1.0, odd=("w",)))
    figures = ["models", "parameters", "weight_bytes", "macs", "macs_protocol", "macs_by_module"]
    measured = ["perplexity", "tasks", "layer_error", "warnings", "samples"]
    assert list(report) == figures + measured
    assert report["models"] == ["dense", "pruned"]
    assert report["perplexity"] == {"text": {"dense": 2.0, "pruned": 1.0, "protocol": "how"}}
    assert report["tasks"]["mmlu_anatomy"] == {
        "metric": "acc",
        "samples": 8,
        "fewshot": 0,
        "of": "mmlu",
        "dense": {"value": 2.0, "stderr": None},
        "pruned": {"value": 1.0, "stderr": None},
    }
    assert report["layer_error"] == [{"index": i, "pruned": pytest.approx(0.25)} for i in range(3)]
    assert report["samples"] == [
        {"prompt": "a", "mode": "greedy", "dense": "a 2.0", "pruned": "a 1.0"}
    ]
    [warning] = report["warnings"]
    assert "1 matrices have a side that is no multiple of 8 (w, …)" in warning


def test_layers_that_are_gone_leave_the_dense_outputs():
    dense, pruned = column(2.0), column(2.0).without_layers({1})
    assert compare(dense=dense, pruned=pruned)["layer_error"] == []  # 3 layers and 2 don't pair
    report = compare(dense=dense.without_layers({1}), pruned=pruned)
    assert [row["index"] for row in report["layer_error"]] == [0, 2]


def test_what_was_not_measured_has_no_key():
    bare = Evaluation(parameters=1, weight_bytes=4, odd_widths={8: frozenset(), 64: frozenset()})
    report = Comparison(columns={"model": bare}, macs_tokens=0, protocols={}).to_json()
    assert not {"macs", "tasks", "layer_error"} & report.keys()
    assert report["warnings"] == []
    alone = compare(model=column(1.0, odd=("w",)))
    assert alone["warnings"], "without a dense model all odd widths count"
    assert "layer_error" not in alone
