"""Perplexity against a loop of its own, at any stride, with layers spread over devices, with little
memory.
"""

import math

import pytest
import torch
from conftest import tiny_llama, token_ids
from transformers import BertConfig, BertModel

from prunekit.config import EvalConfig
from prunekit.data.tokens import evaluation_windows
from prunekit.errors import ConfigError
from prunekit.evaluation.measures import Measures
from prunekit.evaluation.perplexity import describe_protocol, perplexity


class Characters:
    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 97 for letter in text]}


def test_a_model_that_predicts_no_next_token_is_refused():
    encoder = BertModel(BertConfig(hidden_size=16, num_hidden_layers=0, num_attention_heads=2))
    around = {"corpora": {}, "seed": 0, "tokenizer": Characters(), "device": "cpu"}
    settings = EvalConfig(corpora=["embedded"])
    with pytest.raises(ConfigError, match="predicts the next token of a text, got BertModel; eval"):
        Measures(settings, **around, model=encoder, stored=torch.float32)


TEXT = "".join(chr(33 + int(i)) for i in token_ids(1, 203)[0])


def by_hand(model, ids, length, stride):
    """Every token by itself: the mean of −log p, float64; the longest context a window gives it."""
    losses, begin, done = [], 0, 1
    while begin + length <= len(ids):
        for place in range(max(done, begin + 1), begin + length):
            logits = model(input_ids=ids[None, begin:place], use_cache=False).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, -1)[ids[place]].item())
        done, begin = begin + length, begin + stride
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize(
    ("length", "stride"), [(16, None), (16, 16), (16, 5), (16, 15), (16, 1), (203, None), (2, 2)]
)
@torch.no_grad()
def test_equals_a_loop_over_single_tokens(length, stride):
    model = tiny_llama()
    windows = evaluation_windows([TEXT], Characters(), length, None, "it", stride)
    ids = torch.tensor(Characters()(TEXT)["input_ids"])
    expected, count = by_hand(model, ids, length, stride or length)
    if stride is None or stride >= length:  # a window's first token is nobody's
        assert count == windows.numel() - len(windows)
    for batch in (None, 1, 3):
        assert perplexity(model, windows, batch, stride=stride) == pytest.approx(expected, rel=1e-5)
    assert f"windows of {length}" in describe_protocol(windows, stride)


def test_half_on_another_device():
    """Weights that accelerate keeps elsewhere are on meta until they are needed; inputs go where it
    wants them.
    """
    from accelerate import cpu_offload, dispatch_model

    windows = token_ids(5, 12)
    expected = perplexity(tiny_llama(), windows)
    assert perplexity(cpu_offload(tiny_llama()), windows) == expected
    model = tiny_llama()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "disk"}
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        spread = dispatch_model(model, places, main_device="cpu", offload_dir=folder)
        assert next(spread.model.layers[1].parameters()).is_meta
        assert perplexity(spread, windows) == expected


class Narrow(torch.nn.Module):
    """Runs out of memory beyond so many windows."""

    def __init__(self, most, error):
        super().__init__()
        self.model, self.most, self.error = tiny_llama(), most, error

    def forward(self, input_ids, use_cache):
        if len(input_ids) > self.most:
            raise self.error
        return self.model(input_ids=input_ids, use_cache=use_cache)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_halves_the_batch(error):
    windows = token_ids(40, 6)
    assert perplexity(Narrow(5, error), windows) == pytest.approx(
        perplexity(tiny_llama(), windows), rel=1e-6
    )
    with pytest.raises(
        ConfigError, match=r"out of memory at eval\.batch_size=8: eval\.batch_size=4 halves it"
    ):
        perplexity(Narrow(5, error), windows, 8)
    with pytest.raises(ConfigError, match=r"a shorter eval\.window"):
        perplexity(Narrow(0, error), windows)


def test_half_precision_sums_in_float32():
    windows = token_ids(64, 32)
    model = tiny_llama().bfloat16()
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1].double()
    picked = torch.log_softmax(logits, -1).gather(2, windows[:, 1:, None])
    assert perplexity(model, windows, 64) == pytest.approx(math.exp(-picked.mean()), rel=1e-6)
