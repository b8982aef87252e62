"""The machine a run is on: devices and number types by name, seconds and peak memory of its stages."""

from __future__ import annotations

import os

import torch

from prunekit.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device a name stands for; `auto` takes a GPU where there is one."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # one GPU for each process of torchrun
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device: {name!r} can't be used here: {str(error).splitlines()[0]}"
        ) from error
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """The type a name stands for; None for `auto`."""
    known = {
        "auto": None,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in known:
        raise ConfigError(f"dtype: unknown {name!r}; available: {', '.join(known)}")
    return known[name]
