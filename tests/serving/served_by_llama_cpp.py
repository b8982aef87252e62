"""Pruned GGUF files in llama.cpp's server, asked over HTTP as any client asks it: the same greedy
text as `prunekit.from_pretrained`.

The server is llama.cpp's own, which xllamacpp starts on a port of this machine.
"""

import json
import urllib.request

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.checkpoint import load_tokenizer
from prunekit.data.corpora import load_corpus
from prunekit.demo import DEMO_MODEL
from prunekit.exports.gguf import Gguf

LENGTH = 24
PROMPTS = ["import os\n\ndef", "class Reader:\n    def __init__(self", "for name in"]
WHOLE = ["groups=layer", "schedule=oneshot", "compensation=none", "importance=similarity"]
RECOVERY = ["corpus=embedded", "samples=16", "length=32", "batch_size=4", "evaluations=1"]
RECOVERY = ["eval=none", *(f"recovery.{line}" for line in RECOVERY), "recovery.holdout=2"]
CASES = {
    "free": ["shapes=free"],
    "aligned": [],
    "uniform": ["shapes=uniform"],
    "layers": WHOLE,
    "recovered": [],
}


def prune(case):
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).float()
    tokenizer = load_tokenizer(DEMO_MODEL)
    text = "\n\n".join(load_corpus("embedded", "calibration", {}, characters=20_000))
    ids = torch.tensor(tokenizer(text)["input_ids"])
    calibration = ids[: 16 * 32].view(16, 32)
    prunekit.prune(model, ratio=0.2, calibration=calibration, overrides=CASES[case])
    if case == "recovered":
        prunekit.recover(model, tokenizer, overrides=RECOVERY)
    return model, tokenizer


@torch.no_grad()
def greedy(model, ids):
    """Without a cache, so that what a server caches is compared with what has none; up to the
    first tie, which rounding would decide.
    """
    given = ids.shape[1]
    for _ in range(LENGTH):
        best = model(input_ids=ids, use_cache=False).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < 1e-3:
            break
        ids = torch.cat([ids, best.indices[:1, None]], dim=1)
    return ids[0, given:]


def start(file):
    """llama.cpp's server with the defaults of its command line, but for one slot and two numbers
    that make it exact: a cache and sums in float32.
    """
    xllamacpp = pytest.importorskip("xllamacpp", reason="the package xllamacpp is missing")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 256, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = -1
    return xllamacpp.Server(params)


def ask(server, path, **body):
    request = urllib.request.Request(
        server.listening_address + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize("case", CASES)
def test_the_same_greedy_text(case, tmp_path):
    model, tokenizer = prune(case)
    prunekit.save_pretrained(model, tmp_path / "model", tokenizer)
    loaded = prunekit.from_pretrained(tmp_path / "model")
    server = start(Gguf(dtype="f32").write(loaded, tokenizer, tmp_path))
    compared = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = greedy(loaded, ids)
        expected = tokenizer.decode(tokens)
        compared += len(tokens)
        asked = {"prompt": prompt, "temperature": 0}
        own = ask(server, "/completion", n_predict=LENGTH, **asked)
        assert own["content"].startswith(expected)
        answer = ask(server, "/v1/completions", max_tokens=LENGTH, **asked)  # OpenAI's protocol
        assert answer["choices"][0]["text"].startswith(expected)
    assert compared > LENGTH
