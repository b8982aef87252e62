"""llama.cpp through xllamacpp, in this process: log-probabilities, greedy continuations and tokens
of a GGUF file; and a small tokenizer.
"""

import json
import urllib.request

import pytest
from transformers import PreTrainedTokenizerFast


class LlamaCpp:
    """A GGUF file loaded with one thread, a float32 cache and no fused attention."""

    def __init__(self, file, context=256):
        xllamacpp = pytest.importorskip("xllamacpp", reason="the package xllamacpp is missing")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = (
            str(file),
            context,
            1,
            False,
        )
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.fit_params, params.verbosity = False, -1
        self.server = xllamacpp.Server(params)

    def _post(self, path, **body):
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def complete(self, ids, length, candidates):
        """(log-probabilities of the first token by id, the greedy continuation)."""
        answer = self._post(
            "/completion",
            prompt=ids,
            n_predict=length,
            temperature=0,
            n_probs=candidates,
            return_tokens=True,
            cache_prompt=False,
        )
        first = answer["completion_probabilities"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in first}, answer["tokens"]

    def tokens(self, text):
        """The ids of a text as a prompt gets them."""
        return self._post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]


def fast(tokenizer, **special):
    """A tokenizer of transformers that begins and ends texts with <s> and </s>."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **special
    )


def letter_tokenizer():
    """A byte-level tokenizer of 97 tokens: two special ones, ASCII and a merged one."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"<s>": 0, "</s>": 1}
    ascii_letters = {chr(code): code - 31 for code in range(33, 126)}
    vocabulary = special | ascii_letters | {"Ġ": 95, "th": 96}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return fast(tokenizer)
