"""Pruned folders in vLLM on a CPU: the same greedy tokens as `prunekit.from_pretrained`.

vLLM lives in an environment of its own, whose Python PRUNEKIT_SERVING names: `make test-serving`
makes it. `make test` does not collect this file, whose name is none of a test.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from families import build
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.demo import DEMO_MODEL

LENGTH = 24
WORKER = Path(__file__).parent / "vllm_worker.py"
PROMPTS = [[3, 17, 42, 5], [60, 2, 2, 31, 8, 90, 11], [77]]
# vLLM's attention on a CPU takes heads of 32 channels and more.
SIZES = {
    "vocab_size": 97,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 256,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 160}
FAMILIES = {
    "llama": SIZES,
    "qwen2": {name: value for name, value in SIZES.items() if name != "head_dim"},
    "qwen3": SIZES,
    "gemma3_text": SIZES | {"sliding_window": 4, "sliding_window_pattern": 2},
    "qwen3_moe": SIZES | EXPERTS,
}
WIDTHS = ("free", "aligned", "uniform")
# Case → family, options of the pruning, options of the engine.
CASES = {f"{f}-{w}": (f, [f"shapes={w}"], {}) for f in FAMILIES for w in WIDTHS}
CASES |= {
    "embedded-free": ("embedded", ["shapes=free"], {}),
    "embedded-uniform": ("embedded", ["shapes=uniform"], {}),
    "embedded-layers": ("embedded", ["groups=layer", "policy=uniform"], {}),
    "embedded-recovered": ("embedded", [], {}),
}


def dense(family):
    if family == "embedded":
        return AutoModelForCausalLM.from_pretrained(DEMO_MODEL).float()
    model = build(family, FAMILIES[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)  # of `build`'s scale, with which softmaxes would be one-hot
    return model


def prune(case, folder):
    """The folder of a case's model; with its code, where its layers differ."""
    family, overrides, _ = CASES[case]
    model = dense(family)
    calibration = torch.randint(
        2, model.config.vocab_size, (16, 24), generator=torch.Generator().manual_seed(0)
    )
    prunekit.prune(model, ratio=0.25, calibration=calibration, overrides=overrides)
    prunekit.save_pretrained(model, folder, remote_code=True)


@torch.no_grad()
def greedy(model, prompt):
    """Without a cache, so that what a server caches is compared with what has none."""
    ids = list(prompt)
    for _ in range(LENGTH):
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
    return [int(token) for token in ids[len(prompt) :]]


@pytest.fixture(scope="session")
def python():
    """The Python that has vLLM; without one everything here is skipped."""
    path = os.environ.get("PRUNEKIT_SERVING", "")
    if not Path(path).is_file():
        pytest.skip("vLLM's environment is missing: make test-serving makes it")
    done = subprocess.run([path, "-c", "import vllm"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"vLLM can't be imported: {done.stderr.strip().splitlines()[-1]}")
    return path


@pytest.fixture(scope="session")
def served(python, tmp_path_factory):
    """Case → the tokens of prunekit, and what vLLM answered."""
    root = tmp_path_factory.mktemp("serving")
    expected, request = {}, []
    for case, (_, _, engine) in CASES.items():
        folder = root / case
        prune(case, folder)
        model = prunekit.from_pretrained(folder)
        expected[case] = [greedy(model, prompt) for prompt in PROMPTS]
        remote = {"trust_remote_code": True} if [*folder.glob("*.py")] else {}
        asked = {"prompts": PROMPTS, "length": LENGTH, "engine": remote | engine}
        request.append({"name": case, "folder": str(folder), **asked})
    (root / "request.json").write_text(json.dumps(request))
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(root / "modules"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.pop("PYTHONPATH", None)
    command = [python, str(WORKER), str(root / "request.json"), str(root / "answers")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = (root / "answers").read_text().splitlines() if (root / "answers").exists() else []
    answers = {answer["name"]: answer for answer in map(json.loads, lines)}
    missing = {"error": f"no answer: {done.stderr[-3000:]}"}
    return {case: (expected[case], answers.get(case, missing)) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_the_same_greedy_tokens(served, case):
    expected, answer = served[case]
    assert "error" not in answer, answer["error"]
    assert answer["tokens"] == expected
