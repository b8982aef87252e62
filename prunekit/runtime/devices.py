"""Devices and number types by name, and the type that a device computes in."""

from __future__ import annotations

import os

import torch

from prunekit.errors import ConfigError, first_line
from prunekit.runtime.numbers import computing_type


def pick_device(name: str) -> torch.device:
    """The device a name stands for; `auto` takes a GPU where there is one.

    Raises:
        ConfigError: torch knows no such device, or can't use it on this machine.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name.partition(":")[0] == "meta":
        raise ConfigError(
            f"device: expected one that holds numbers, such as cpu or cuda, got {name!r}"
        )
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # one GPU for each process of torchrun
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as error:  # torch lists every kind of device that it knows
        raise ConfigError(
            f"device: expected auto, cpu, cuda, cuda:N, mps or another of torch's, got {name!r}"
        ) from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device: {name!r} can't be used here: {first_line(error)}") from error
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """The number type a name stands for; None for `auto`.

    Raises:
        ConfigError: an unknown name.
    """
    known = {
        "auto": None,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in known:
        raise ConfigError(f"dtype: unknown {name!r}; available: {', '.join(known)}")
    return known[name]


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that weights stored as `stored` compute in: float32 for half precision on a CPU."""
    return computing_type(stored) if device.type == "cpu" else stored
