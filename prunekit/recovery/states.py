"""Files of the trainable weights alone, in safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def save_trained(model: nn.Module, path: Path) -> None:
    """Write the trainable parameters as they are now, all or nothing."""
    trained = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    temporary = path.with_suffix(".tmp")
    save_file(trained, temporary)
    temporary.replace(path)


@torch.no_grad()
def load_trained(model: nn.Module, path: Path) -> None:
    """Read the trainable parameters back, in place."""
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        parameters[name].copy_(tensor)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; a checkpoint's `trainer_state.json` is written last."""
    checkpoints = folder.glob("checkpoint-*")
    for path in sorted(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return path
    return None
