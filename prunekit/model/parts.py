"""The parts of a model that also sees or hears: its language model, and what lies beside it."""

from __future__ import annotations

from torch import nn

from prunekit.model.inputs import text_config


def find_language_part(model: nn.Module) -> str | None:
    """The path of the language model in a model that also sees or hears.

    It is the outermost module that has the config of the text. None where the whole model is a
    language model, or is none; where an encoder and a decoder are both meant; and where the text is
    only read, as in CLIP.
    """
    from transformers import PretrainedConfig, PreTrainedModel

    config, text = getattr(model, "config", None), text_config(model)
    if not isinstance(config, PretrainedConfig) or config.is_encoder_decoder or text is config:
        return None
    if not (isinstance(model, PreTrainedModel) and model.can_generate()):
        return None
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and type(module.config) is type(text):
            return path
    return None


def image_tokens(model: nn.Module) -> set[int]:
    """The ids of tokens that stand for what is no text, as the model's config names them."""
    values = vars(getattr(model, "config", None) or object).items()
    return {
        value
        for name, value in values
        if name.endswith(("_token_id", "_token_index")) and type(value) is int
    } - {getattr(text_config(model), f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
