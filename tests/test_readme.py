"""The README's code on a module that is no language model runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    first = next(i for i, block in enumerate(blocks) if "nn.Sequential" in block)
    for block in blocks[first:]:
        exec(block, names)
    assert names["net"][0].out_features < 64
    assert "PruningPlan" in capsys.readouterr().out
