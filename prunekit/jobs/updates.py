"""The file of a run that holds low-rank updates which a later recovery goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prunekit.errors import CheckpointError, first_line
from prunekit.model.updates import Factors, pack, unpack
from prunekit.runtime.files import disk_errors

UPDATES = "updates.safetensors"


def write_updates(updates: Mapping[str, Factors], path: Path) -> None:
    """Write updates: name of a weight → U [out, r] and V [r, in].

    Raises:
        CheckpointError: the disk is full or forbids writing.
    """
    from safetensors.torch import save_file

    with disk_errors(path):
        save_file({key: factor.contiguous() for key, factor in pack(updates).items()}, path)
    path.chmod(0o644)


def read_updates(path: Path) -> dict[str, Factors]:
    """Read what `write_updates` wrote, on the CPU.

    Raises:
        CheckpointError: the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return unpack(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: damaged: {first_line(error)}; without it a recovery begins with new adapters"
        ) from error
