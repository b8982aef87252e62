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
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit
from prunekit.checkpoint import load_tokenizer
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
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 160}
FAMILIES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "gemma3_text": SIZES | {"sliding_window": 4, "sliding_window_pattern": 2},
    "qwen3_moe": SIZES | EXPERTS,
}
WIDTHS = ("free", "aligned", "uniform")
WHOLE = ["groups=layer", "schedule=oneshot", "compensation=none", "importance=similarity"]
TWO = ["shapes=uniform", "scope.tensor_parallel=2"]
# Case → family, options of the pruning, options of the engine.
CASES = {f"{f}-{w}": (f, [f"shapes={w}"], {}) for f in FAMILIES for w in WIDTHS}
CASES |= {
    # vLLM's own class takes the hidden size over the heads for the width of a head.
    "qwen2-uniform": ("qwen2", ["shapes=uniform"], {"model_impl": "transformers"}),
    "qwen2-uniform-ffn": ("qwen2", ["shapes=uniform", "groups=mlp"], {}),
    "embedded-free": ("embedded", ["shapes=free"], {}),
    "embedded-uniform": ("embedded", ["shapes=uniform"], {}),
    "embedded-layers": ("embedded", WHOLE, {}),
    "embedded-recovered": ("embedded", [], {}),
    "embedded-emptied": ("embedded", [], {}),
    "embedded-uniform-two": ("embedded", TWO, {"tensor_parallel_size": 2}),
    "embedded-free-two": ("embedded", ["shapes=free", TWO[1]], {"tensor_parallel_size": 2}),
}
REFUSED = ("embedded-emptied",)  # vLLM wants attention in every layer
RECOVERY = ["corpus=embedded", "samples=16", "length=32", "batch_size=4", "evaluations=1"]
RECOVERY = ["eval=none", *(f"recovery.{line}" for line in RECOVERY), "recovery.holdout=2"]


def dense(family):
    if family == "embedded":
        return AutoModelForCausalLM.from_pretrained(DEMO_MODEL).float()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    with torch.no_grad():
        for parameter in model.parameters():  # norms' gains vary, logits are of the size of one
            mean, scale = (1.0, 0.3) if parameter.ndim == 1 else (0.0, 0.08)
            parameter.normal_(mean, scale)
    return model.eval()


def prune(case, folder):
    """The folder of a case's model; with its code, where its layers differ."""
    family, overrides, _ = CASES[case]
    model = dense(family)
    calibration = torch.randint(
        2, model.config.vocab_size, (16, 24), generator=torch.Generator().manual_seed(0)
    )
    prunekit.prune(model, ratio=0.15, calibration=calibration, overrides=overrides)
    if case == "embedded-recovered":
        prunekit.recover(model, load_tokenizer(DEMO_MODEL), overrides=RECOVERY)
    elif case == "embedded-emptied":
        graph = prunekit.trace(model, {"input_ids": calibration[:2]})
        units = graph["layers.1.self_attn"].num_units
        plan = prunekit.PruningPlan({"layers.1.self_attn": range(units)})
        prunekit.apply_plan(model, graph, plan)
    prunekit.save_pretrained(model, folder, remote_code=True)


@torch.no_grad()
def greedy(model, prompt):
    """Without a cache, so that what a server caches is compared with what has none."""
    ids = torch.tensor([prompt])
    for _ in range(LENGTH):
        best = model(input_ids=ids, use_cache=False).logits[0, -1].topk(2)
        assert best.values[0] - best.values[1] > 2e-5, "a tie, which rounding would decide"
        ids = torch.cat([ids, best.indices[:1, None]], dim=1)
    return ids[0, len(prompt) :].tolist()


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


def ask(python, root, request, devices):
    """What vLLM answers to a list of cases, in a process of its own: case → its answer."""
    asked, answers = root / f"request{devices}", root / f"answers{devices}"
    asked.write_text(json.dumps(request))
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(root / "modules"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # A core for each worker: where there is one NUMA node, vLLM doesn't share them out.
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(devices))),
    }
    environment.pop("PYTHONPATH", None)
    command = [python, str(WORKER), str(asked), str(answers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = answers.read_text().splitlines() if answers.exists() else []
    missing = {"error": f"no answer: {done.stderr[-3000:]}"}
    found = {case["name"]: missing for case in request}
    return found | {answer["name"]: answer for answer in map(json.loads, lines)}


@pytest.fixture(scope="session")
def served(python, tmp_path_factory):
    """Case → the tokens of prunekit, and what vLLM answered."""
    root = tmp_path_factory.mktemp("serving")
    expected, requests = {}, {1: [], 2: []}
    for case, (_, _, engine) in CASES.items():
        folder = root / case
        prune(case, folder)
        model = prunekit.from_pretrained(folder)
        expected[case] = [greedy(model, prompt) for prompt in PROMPTS]
        remote = {"trust_remote_code": True} if [*folder.glob("*.py")] else {}
        asked = {"name": case, "folder": str(folder), "prompts": PROMPTS, "length": LENGTH}
        devices = engine.get("tensor_parallel_size", 1)
        requests[devices].append(asked | {"engine": remote | engine})
    answers = {}
    for devices, request in requests.items():
        answers |= ask(python, root, request, devices)
    return {case: (expected[case], answers[case]) for case in CASES}


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_the_same_greedy_tokens(served, case):
    expected, answer = served[case]
    assert "error" not in answer, answer["error"]
    assert answer["tokens"] == expected
    _, overrides, engine = CASES[case]
    alike = "shapes=uniform" in overrides or overrides == WHOLE
    assert answer["class"].startswith("Transformers") == (not alike or "model_impl" in engine)


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_page_says_vllm_can_not_run(served, case):
    _, answer = served[case]
    assert "error" in answer
