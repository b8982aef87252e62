"""Two processes that measure a model or train gates together find what one does.

Each does half of the work.
"""

import json
from pathlib import Path

import pytest
from conftest import tiny_llama, token_ids
from processes import run_together
from rows_of_gates import check_together
from safetensors.torch import load_file
from test_tasks import PIQA, characters, write  # noqa: F401

from prunekit.evaluation.perplexity import perplexity
from prunekit.evaluation.tasks import evaluate_tasks
from prunekit.runtime.processes import in_order

# Prints what each process measured, and how many rows it ran for that: first as it is, then with
# memory that does not suffice in the second process for more than two rows. Then they train gates.
_MEASURE = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from conftest import tiny_llama, token_ids
from rows_of_gates import train_on_rows
from safetensors.torch import save_file
from transformers import AutoTokenizer
from prunekit.evaluation.cache import Cache
from prunekit.evaluation.perplexity import perplexity
from prunekit.evaluation.tasks import evaluate_tasks
from prunekit.runtime.processes import process_group, rank

model, rows, most = tiny_llama(layers=1), [], 99
model.config.max_position_embeddings = 512

def count(_, args, options):
    rows.append(len(args[0] if args else options["input_ids"]))
    if rows[-1] > most and rank() == 1:
        raise torch.OutOfMemoryError("out of memory")

model.register_forward_pre_hook(count, with_kwargs=True)
tokenizer = AutoTokenizer.from_pretrained("tokenizer")
with process_group(torch.device("cpu")):
    for batch, most, times in ((2, 99, 2), (None, 2, 1)):
        rows.clear()
        plain = perplexity(model, token_ids(11, 9), batch, stride=4, shared=True)
        ran = sum(rows)
        owner = (None, None) if rank() else (Path(f"cache{{most}}"), "model")
        cache, scores = Cache(*owner, shared=True), []
        for _ in range(times):
            found = evaluate_tasks(model, tokenizer, ["piqa"], tasks_dir=Path(), cache=cache)
            scores.append(found["piqa"].to_json())
        print("RESULT", json.dumps([plain, ran, sum(rows) - ran, scores]))
    save_file(train_on_rows(4), f"gates{{rank()}}")
"""


def test_two_processes_share_perplexity_tasks_and_gates(characters, tmp_path):  # noqa: F811
    characters.save_pretrained(tmp_path / "tokenizer")
    write(tmp_path)
    tests = str(Path(__file__).parent.parent)
    done = run_together(_MEASURE.format(tests=tests), cwd=tmp_path)
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    printed = [line for one in done for line in one.stdout.splitlines() if "RESULT" in line]
    first, first_short, second, second_short = (json.loads(line[7:]) for line in printed)
    model = tiny_llama(layers=1)
    model.config.max_position_embeddings = 512
    expected = perplexity(model, token_ids(11, 9), 2, stride=4)
    score = evaluate_tasks(model, characters, ["piqa"], tasks_dir=tmp_path)["piqa"].to_json()
    assert first == [expected, 6, len(PIQA), [score, score]], "half of two requests a question"
    assert second == [expected, 5, len(PIQA), [score, score]], "the second time from the cache"
    for plain, _, _, scores in (first_short, second_short):
        assert plain == pytest.approx(expected, rel=1e-6)
        assert scores == [score]
    check_together(*(load_file(tmp_path / f"gates{rank}") for rank in (0, 1)))


def test_parts_are_put_in_order():
    for number in (1, 2, 3):
        for count in (0, 1, 5, 6):
            items = list(range(count))
            assert in_order([items[rank::number] for rank in range(number)]) == items
