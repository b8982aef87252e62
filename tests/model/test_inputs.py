"""What a model is called with: how long its inputs may be, and no key-value cache."""

import pytest
from torch import nn
from transformers import LlamaConfig, LlavaConfig

from prunekit.errors import ConfigError
from prunekit.model.inputs import check_length, longest, without_cache


@pytest.fixture
def seeing():
    """A model with a vision tower, whose language model has a config of its own."""
    model = nn.Module()
    model.config = LlavaConfig(text_config=LlamaConfig(max_position_embeddings=77))
    return model


def test_the_length_is_that_of_the_language_model(seeing):
    assert longest(seeing) == 77
    check_length("eval.window", 77, seeing)
    with pytest.raises(ConfigError, match=r"^eval.window: expected at most the 77 tokens .* 78$"):
        check_length("eval.window", 78, seeing)


@pytest.mark.parametrize("keeps", [True, False])
def test_the_cache_is_that_of_the_language_model(seeing, keeps):
    seeing.config.text_config.use_cache = keeps
    assert without_cache(seeing, {"x": 1}) == ({"use_cache": False, "x": 1} if keeps else {"x": 1})
    assert without_cache(seeing, {"use_cache": True}) == {"use_cache": True}
    assert without_cache(seeing, (1,)) == (1,)
