"""What running a model as it is needs: evaluation mode, where its inputs go, how long they may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunekit.errors import ConfigError


def input_device(model: nn.Module) -> torch.device:
    """Where a model wants its inputs: where accelerate runs its first module, else where its first
    weights are.
    """
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            if (device := getattr(part, "execution_device", None)) is not None:
                return (
                    torch.device("cuda", device)
                    if isinstance(device, int)
                    else torch.device(device)
                )
    return next(model.parameters()).device


def longest(model: nn.Module) -> int | None:
    """Tokens a model was made for, where its config tells."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None


def check_length(name: str, tokens: int, model: nn.Module) -> None:
    """Raise ConfigError where a setting asks for windows longer than the model was made for."""
    limit = longest(model)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"{name}: expected at most the {limit} tokens the model was made for, got {tokens}"
        )


def without_cache(model: nn.Module, inputs: Any) -> Any:
    """Keyword arguments of a forward call that keeps no key-value cache, where the model would keep
    one by default.
    """
    keeps = getattr(getattr(model, "config", None), "use_cache", False)
    return {"use_cache": False, **inputs} if keeps and isinstance(inputs, Mapping) else inputs
