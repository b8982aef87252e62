"""The small files of a model folder, read with suspicion: JSON, headers of shards, configs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prunekit.errors import CheckpointError, first_line
from prunekit.model.compat import decode_floats
from prunekit.model.names import SYNONYMS

INDEX = "model.safetensors.index.json"
_KERNELS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
)
MANY_LAYERS = 2**16  # a bound on the layers a config may count where no weights are at hand
_MOST_LABELS = 2**20  # transformers makes a dictionary of a config's labels
_LEAST = 2**24  # elements that a table may have in any model, however small


@contextmanager
def locating_errors(where: Path) -> Iterator[None]:
    """Put a file or folder before the message of a CheckpointError raised in a `with` block.

    Meant for functions of `prunekit.model`, which know of no folder.
    """
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where the file is damaged or can't be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged: expected a JSON object")
    return content


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError where a folder holds an adapter of peft and no model."""
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: expected a model, got an adapter of peft: save its model after "
            "merge_and_unload()"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`; CheckpointError where it is missing or damaged."""
    refuse_adapter(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: expected a config.json in the model folder, found none")
    config: dict[str, Any] = decode_floats(read_json(folder / "config.json"))
    return config


def check_name(where: Path, name: object) -> str:
    """Return a name that a file lists; CheckpointError where it would lead out of the folder."""
    if (
        not isinstance(name, str)
        or name in ("", "..")
        or Path(name).name != name
        or "\0" in name
        or "\\" in name
    ):
        raise CheckpointError(
            f"{where}: damaged: expected names of files in the folder, got {name!r:.80}"
        )
    return name


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor → file, as a folder's index says; CheckpointError where the index is damaged."""
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{folder / INDEX}: damaged: expected a weight_map")
    return {name: check_name(folder / INDEX, file) for name, file in places.items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder that hold its model."""
    names = (
        sorted(set(weight_map(folder).values()))
        if (folder / INDEX).exists()
        else ["model.safetensors"]
    )
    return [folder / name for name in names]


def count_tensors(folder: Path) -> tuple[int, int]:
    """Numbers of tensors and of elements in a folder's weights, by the headers of its files."""
    from safetensors import SafetensorError, safe_open

    tensors = elements = 0
    for path in weight_files(folder):
        try:
            with safe_open(str(path), framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (no mapping)
                    tensors += 1
                    elements += torch.Size(stored.get_slice(name).get_shape()).numel()
        except (OSError, SafetensorError, OverflowError) as error:
            raise CheckpointError(
                f"{folder}: damaged weights: {path.name}: {first_line(error)}"
            ) from error
    return tensors, elements


def check_config(
    path: Path, config: Mapping[str, Any], tensors: int, trust_remote_code: bool = False
) -> None:
    """Raise CheckpointError where a config asks for endless work, or for code from elsewhere.

    Args:
        path: the file of the config, for messages.
        config: its content, configs inside it included.
        tensors: how many tensors the folder's weights are; there can't be more layers.
        trust_remote_code: allow an attention implementation that is code of another repository.
    """
    bounds = dict.fromkeys(SYNONYMS["num_hidden_layers"], tensors) | {"num_labels": _MOST_LABELS}
    waiting = [config]
    while waiting:
        for name, value in waiting.pop().items():
            if name in bounds and isinstance(value, int | float) and not 0 <= value <= bounds[name]:
                raise CheckpointError(
                    f"{path}: damaged: {name}: expected 0 to {bounds[name]}, got {value!s:.40}"
                )
            if name in _KERNELS and "/" in str(value) and not trust_remote_code:
                raise CheckpointError(
                    f"{path}: {name}: {value!s:.80} is code from elsewhere: needs trust_remote_code"
                )
            if isinstance(value, dict):
                waiting.append(value)


@contextmanager
def within(elements: int) -> Iterator[None]:
    """Refuse, during a `with` block, tensors that are too large for a model of so many elements.

    Raises:
        ValueError: such a tensor is asked for; no memory is taken for it.
    """
    with _Bounded(max(_LEAST, 16 * elements)):
        yield


class _Bounded(TorchDispatchMode):  # type: ignore[misc]
    """Looks at every factory of tensors (a device, no tensor among its arguments) on meta first."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and not any(isinstance(arg, torch.Tensor) for arg in args):
            shape = func(
                *args, **{**kwargs, "device": torch.device("meta"), "pin_memory": False}
            ).shape
            if shape.numel() > self.most:
                raise ValueError(
                    f"a tensor of {'×'.join(map(str, shape))} is more than the weights allow"
                )
        return func(*args, **kwargs)
