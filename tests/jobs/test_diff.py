"""`task=diff`: two plans of one model compared, as a user types it."""

import json

import pytest
from conftest import command_line

import prunekit

FIRST = {"layers.0.mlp": [0, 1, 2, 3], "layers.10.mlp": [5], "layers.2.self_attn": [1]}
SECOND = {"layers.0.mlp": [2, 3, 4], "layers.2.self_attn": [1], "layers.2.mlp": [7, 9]}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text(prunekit.PruningPlan(FIRST, "one").to_json())
    (tmp_path / "second.json").write_text(prunekit.PruningPlan(SECOND, "one").to_json())
    (tmp_path / "other.json").write_text(prunekit.PruningPlan(SECOND, "another").to_json())
    (tmp_path / "newer.json").write_text('{"format": 2}')
    (tmp_path / "empty.json").write_text(prunekit.PruningPlan({}, "one").to_json())
    return tmp_path


def compared(place, plans):
    done = command_line("task=diff", f"plans={plans}", "output_dir=out", cwd=place)
    assert done.returncode == 0, done.stderr
    return json.loads((place / "out" / "diff.json").read_text()), done.stdout


def test_figures_by_hand(place):
    found, printed = compared(place, "[run,second.json]")
    assert found["plans"] == ["run", "second.json"]
    keys = ("group", "first", "second", "both", "jaccard", "only_first", "only_second")
    by_hand = [
        ("layers.0.mlp", 4, 3, 2, 2 / 5, [0, 1], [4]),
        ("layers.2.mlp", 0, 2, 0, 0.0, [], [7, 9]),
        ("layers.2.self_attn", 1, 1, 1, 1.0, [], []),
        ("layers.10.mlp", 1, 0, 0, 0.0, [5], []),
    ]
    assert found["groups"][:-1] == [dict(zip(keys, row, strict=True)) for row in by_hand]
    assert found["groups"][-1] == {
        "group": "all",
        "first": 6,
        "second": 6,
        "both": 3,
        "jaccard": 3 / 9,
    }
    assert all(row["group"] in printed for row in found["groups"])


def test_a_plan_is_like_itself(place):
    rows = compared(place, "[run,run]")[0]["groups"]
    assert {row["jaccard"] for row in rows} == {1.0}


def test_plans_that_remove_nothing_agree(place):
    assert compared(place, "[empty.json,empty.json]")[0]["groups"] == [
        {"group": "all", "first": 0, "second": 0, "both": 0, "jaccard": 1.0}
    ]


@pytest.mark.parametrize(
    ("plans", "match"),
    [
        ("[run,other.json]", "expected two for one model, got one for one and one for another"),
        ("[run]", "plans: expected two, plans=[RUN,RUN], got run"),
        ("[run,run,run]", "got run, run, run"),
        ("[]", "got none"),
        ("[run,nowhere.json]", "nowhere.json: can't read the plan"),
        ("[run,newer.json]", "newer.json: expected format 1, got 2"),
        ("[damaged.json,run]", "damaged.json: not a pruning plan"),
        ("[binary.json,run]", "binary.json: not a pruning plan"),
        ("[folder,run]", "plan.json: can't read the plan"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place, plans, match):
    (place / "damaged.json").write_text((place / "second.json").read_text()[:40])
    (place / "binary.json").write_bytes(b"\xff\xfe\x00")
    (place / "folder").mkdir()
    failed = command_line("task=diff", f"plans={plans}", "output_dir=out", cwd=place)
    lines = failed.stderr.strip().splitlines()
    assert failed.returncode == 2 and len(lines) == 1, failed.stderr
    assert match in lines[0]
    assert not (place / "out").exists()
