"""ONNX graphs with a cache in onnxruntime-genai and optimum: the same greedy tokens as
`prunekit.from_pretrained`.

Both live in an environment of their own, whose Python PRUNEKIT_SERVING_ONNX names: `make
test-serving` makes it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import served_by_vllm as vllm

import prunekit
from prunekit.checkpoint import load_tokenizer
from prunekit.demo import DEMO_MODEL
from prunekit.exports.onnx import Onnx

WORKER = Path(__file__).parent / "onnx_worker.py"
TEXTS = ["import os\n\ndef", "class Reader:\n    def __init__(self", "for name in"]
GENAI = [
    *("llama-free", "qwen2-uniform", "qwen3-aligned", "gemma3_text-free", "qwen3_moe-free"),
    *("embedded-free", "embedded-layers", "embedded-recovered", "embedded-emptied"),
]
OPTIMUM = ["qwen2-uniform-ffn", "gemma3_text-uniform"]
REFUSED = ["llama-free"]  # optimum takes one number of heads for all layers
ASKED = [("genai", case) for case in GENAI] + [("optimum", case) for case in OPTIMUM + REFUSED]


@pytest.fixture(scope="session")
def python():
    """The Python that has both; without one everything here is skipped."""
    path = os.environ.get("PRUNEKIT_SERVING_ONNX", "")
    if not Path(path).is_file():
        pytest.skip("the environment of ONNX's servers is missing: make test-serving makes it")
    load = "import onnxruntime_genai, optimum.onnxruntime"
    done = subprocess.run([path, "-c", load], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"they can't be imported: {done.stderr.strip().splitlines()[-1]}")
    return path


def end_at(token, tokens):
    """Tokens up to the first one that ends a text, where both readers stop."""
    return tokens[: tokens.index(token) + 1] if token in tokens else tokens


@pytest.fixture(scope="session")
def served(python, tmp_path_factory):
    """(reader, case) → the tokens of prunekit, and what the reader answered."""
    root = tmp_path_factory.mktemp("serving")
    tokenizer = load_tokenizer(DEMO_MODEL)
    expected, request = {}, []
    for case in dict.fromkeys(case for _, case in ASKED):
        vllm.prune(case, root / case)
        model = prunekit.from_pretrained(root / case)
        embedded = case.startswith("embedded")
        ids = [tokenizer(text)["input_ids"] for text in TEXTS] if embedded else vllm.PROMPTS
        ends = model.config.eos_token_id
        expected[case] = [end_at(ends, vllm.greedy(model, prompt)) for prompt in ids]
        graph = Onnx(cache=True).write(model, tokenizer if embedded else None, root / case)
        shutil.copy(root / case / "config.json", graph.parent)  # optimum reads it
        asked = {"folder": str(graph.parent), "length": vllm.LENGTH}
        asked["prompts"] = TEXTS if embedded else vllm.PROMPTS
        readers = [reader for reader, own in ASKED if own == case]
        request += [asked | {"name": f"{reader} {case}", "reader": reader} for reader in readers]
    (root / "request").write_text(json.dumps(request))
    command = [python, str(WORKER), str(root / "request"), str(root / "answers")]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    answers = map(json.loads, (root / "answers").read_text().splitlines())
    by_name = {answer["name"]: answer for answer in answers}
    return {(r, case): (expected[case], by_name[f"{r} {case}"]) for r, case in ASKED}


@pytest.mark.parametrize(
    ("reader", "case"), [pair for pair in ASKED if pair not in [("optimum", c) for c in REFUSED]]
)
def test_the_same_greedy_tokens(served, reader, case):
    expected, answer = served[reader, case]
    assert "error" not in answer, answer["error"]
    assert answer["tokens"] == expected


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_page_says_optimum_can_not_run(served, case):
    assert "Expected: 3" in served["optimum", case][1].get("error", "")
