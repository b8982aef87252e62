"""Modules that are none of transformers': saved by weights and sizes, loaded by a factory.

The folder holds no code and no pickle. `module.json` lists the numbers that modules keep as
attributes (`out_channels`, `num_heads`): with them the dense module that the factory makes is
brought to the sizes that were saved.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from prunekit.checkpoint.files import locating_errors, read_json
from prunekit.checkpoint.manifest import check_manifest, write_manifest
from prunekit.checkpoint.weights import persistent_buffers
from prunekit.errors import CheckpointError, first_line
from prunekit.model.build import adopt
from prunekit.model.modeling_prunekit import fit
from prunekit.model.record import record_numbers
from prunekit.model.ties import parameter_places
from prunekit.model.wrappers import unwrap
from prunekit.plan import PruningPlan
from prunekit.runtime.files import new_folder

_RECORD, _WEIGHTS, _PLAN = "module.json", "model.safetensors", "plan.json"
Module = TypeVar("Module", bound=nn.Module)


def save(module: nn.Module, directory: str | Path, plan: PruningPlan | None = None) -> None:
    """Write a pruned module to a folder, from which `load` brings it back bit for bit.

    The folder appears whole or not at all.

    Args:
        module: any module, of a CNN say, or a model of transformers that `save_pretrained` can't
            save, with layers of one's own for instance.
        directory: a new or empty folder.
        plan: what was cut, to be kept beside the weights.

    Raises:
        CheckpointError: the folder is not empty or can't be written.
        TraceError: its weights are sharded, offloaded or quantised.
    """
    from safetensors.torch import save_file

    if not isinstance(module, nn.Module):
        raise CheckpointError(f"module: expected a torch module, got {module!r:.80}")
    module = unwrap(module)
    with new_folder(Path(directory)) as folder:
        record = {"class": _name_of(module), **record_numbers(module)}
        (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        save_file(_tensors_of(module), str(folder / _WEIGHTS), metadata={"format": "pt"})
        if plan is not None:
            (folder / _PLAN).write_text(plan.to_json(), encoding="utf-8")
        write_manifest(folder)


def load(factory: Callable[[], Module], directory: str | Path) -> Module:
    """Load a folder that `save` wrote.

    Example:
        model = prunekit.load(torchvision.models.resnet50, "pruned")

    Args:
        factory: makes the dense module that was pruned; its numbers are replaced by those saved.
        directory: the folder.

    Returns:
        The pruned module in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the folder is missing or damaged, or is of another module; a module in the
            place of the factory.
    """
    if isinstance(factory, nn.Module):
        raise CheckpointError(
            f"factory: expected what makes the dense module, got a {type(factory).__name__} itself"
        )
    folder = Path(directory)
    if not (folder / _RECORD).is_file():
        raise CheckpointError(f"{folder}: expected a folder of prunekit.save, with {_RECORD} in it")
    check_manifest(folder)
    record, tensors = read_json(folder / _RECORD), _read(folder / _WEIGHTS)
    module = factory()
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"factory: expected a torch module from it, got {module!r:.80}")
    if _name_of(module) != record.get("class"):
        raise CheckpointError(
            f"{folder}: it holds a {record.get('class')}, the factory makes a {_name_of(module)}"
        )
    with locating_errors(folder):
        _add_biases(module, tensors)
        try:
            fit(module, record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged: {_RECORD}: {first_line(error)}") from error
        adopt(module, tensors)
    return module.eval()


def _name_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer under its first name, each in memory of its own."""
    parameters = {name: module.get_parameter(name) for name in parameter_places(module)}
    tensors = {**parameters, **persistent_buffers(module)}
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged weights: {first_line(error)}") from error


def _add_biases(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Make room for biases that the dense module lacks: a repair added them."""
    for path, owner in module.named_modules():
        name = f"{path}.bias".lstrip(".")
        if owner._parameters.get("bias", owner) is None and name in tensors:
            owner.bias = nn.Parameter(torch.empty_like(tensors[name]))
