"""A pretrained checkpoint and real stories: the orders and rough sizes of the papers' tables."""

import copy

import prunekit
from prunekit.checkpoint import load_tokenizer
from prunekit.data.corpora import read_file
from prunekit.data.tokens import calibration_windows, evaluation_windows
from prunekit.evaluation.perplexity import perplexity


def test_orders_on_stories(data):
    folder = data / "models" / "stories260K"
    dense, tokenizer = prunekit.from_pretrained(folder), load_tokenizer(folder)
    documents = read_file(data / "tinystories" / "stories.jsonl")
    calibration = calibration_windows(documents, tokenizer, 64, 128, 0)
    windows = evaluation_windows(documents, tokenizer, 128, None, "stories")[::8]
    base = perplexity(dense, windows)
    assert 4.8 < base < 5.4

    def after(ratio, *overrides, method="slimgpt"):
        model = copy.deepcopy(dense)
        prunekit.prune(
            model, ratio=ratio, method=method, calibration=calibration, overrides=list(overrides)
        )
        return perplexity(model, windows)

    for ratio, near in ((0.2185, 8.6), (0.437, 27)):  # a quarter and a half of the units
        obs = after(ratio)
        plain = after(ratio, "compensation=none")
        taylor = after(ratio, "policy=uniform", method="llm_pruner")
        random = after(ratio, method="random")
        assert near / 1.3 < obs < near * 1.3
        assert obs < plain < random
        assert obs < taylor < random
