"""The README's code on a module that is no language model runs as it stands."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def test_the_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    first = next(i for i, block in enumerate(blocks) if "nn.Sequential" in block)
    for block in blocks[first:]:
        exec(block, names)
    assert names["net"][0].out_features < 64
    assert "PruningPlan" in capsys.readouterr().out


def test_what_reads_a_model_stands_beside_the_test_that_ran_it():
    page = (ROOT / "docs" / "howto" / "serving.md").read_text()
    (table,) = re.findall(r"\| what reads it \|.*?\n\n", page, re.DOTALL)
    assert table in README.read_text()
    for row in table.strip().splitlines()[2:]:
        tests = re.findall(r"`(tests/[^`]+)`", row)
        assert tests and all((ROOT / test).is_file() for test in tests), row
