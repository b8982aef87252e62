"""What a model is called with: where its inputs go, how long they may be, no key-value cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn

from prunekit.errors import ConfigError

# Arguments with patches of images → those with the patches of each image: time × height × width.
_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
Inputs = TypeVar("Inputs", bound=Mapping[str, Any] | tuple[Any, ...])


def input_device(model: nn.Module) -> torch.device:
    """The device that a model wants its inputs on.

    That is where accelerate runs its first module, or else where its first weights are.
    """
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if isinstance(device, int):
                return torch.device("cuda", device)
            if device is not None:
                return torch.device(device)
    return next(model.parameters()).device


def longest(model: nn.Module) -> int | None:
    """How many tokens a model was made for; None where its config doesn't tell."""
    tokens = getattr(text_config(model), "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) and tokens > 1 else None


def check_length(name: str, tokens: int, model: nn.Module) -> None:
    """Check that a setting asks for no longer windows than the model was made for.

    Args:
        name: the setting, for the message.
        tokens: its value.
        model: the model that the windows are for.

    Raises:
        ConfigError: it does.
    """
    limit = longest(model)
    if limit is not None and tokens > limit:
        raise ConfigError(
            f"{name}: expected at most the {limit} tokens the model was made for, got {tokens}"
        )


def without_cache(model: nn.Module, inputs: Inputs) -> Inputs:
    """Inputs of a forward call that keeps no key-value cache.

    Keyword arguments get `use_cache=False` where the model would keep one by default and they don't
    say otherwise; positional arguments are returned as they are.
    """
    config = getattr(model, "config", None)
    keeps = getattr(config, "use_cache", None)
    if keeps is None:
        keeps = getattr(text_config(model), "use_cache", False)
    if keeps and isinstance(inputs, Mapping):
        return cast(Inputs, {"use_cache": False, **inputs})
    return inputs


def predicts_tokens(model: Any) -> bool:
    """Whether a model predicts the token behind each one of a text, as far as it tells.

    Encoders and their heads do not, nor does a decoder beside an encoder.
    """
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not encodes and bool(getattr(model, "can_generate", lambda: True)())


def text_config(model: nn.Module) -> Any:
    """The config of the language model in a model, which may also see or hear; or None."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def rows_of_packed(inputs: Mapping[str, Any], rows: int) -> dict[str, list[torch.Tensor]]:
    """The patches of each row's images, of arguments that hold those of all rows one after another.

    Args:
        inputs: keyword arguments of a forward call: `pixel_values` [patches, …] beside
            `image_grid_thw` [images, 3], say. Rows have one image each, or the same number.
        rows: how many rows the call has.

    Returns:
        Name of an argument → a tensor for each row, of the packed ones and of their grids.
    """
    packed = {}
    for name, grid_name in _GRIDS.items():
        patches, grids = inputs.get(name), inputs.get(grid_name)
        if not isinstance(patches, torch.Tensor) or not isinstance(grids, torch.Tensor):
            continue
        if rows and len(grids) % rows == 0:
            sizes = grids.prod(-1).view(rows, -1).sum(1).tolist()
            if sum(sizes) == len(patches):
                packed[name] = list(patches.split(sizes))
                packed[grid_name] = list(grids.split(len(grids) // rows))
    return packed
