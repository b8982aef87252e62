"""The manifest of a saved model folder: checksums of its files, against damage."""

import json
from pathlib import Path

from prunekit.checkpoint.files import check_name, read_json
from prunekit.errors import CheckpointError
from prunekit.runtime.files import checksum

NAME = "prunekit.json"
FORMAT = 1
_WEIGHTS = "*.safetensors"
_LOADED = (_WEIGHTS, "*.safetensors.index.json", "*.py")  # no file of these kinds may be added
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt")  # files of the config and the tokenizer


def write_manifest(folder: Path) -> None:
    """Write `prunekit.json`: the format's version, and the SHA-256 of the files of the folder."""
    files = {
        name: checksum(folder / name)
        for name in sorted(_names(folder, *_LOADED, *_BESIDE) - {NAME})
    }
    (folder / NAME).write_text(
        json.dumps({"format": FORMAT, "sha256": files}, indent=1) + "\n", encoding="utf-8"
    )


def check_manifest(folder: Path, weights: bool = True) -> None:
    """Raise CheckpointError where a file is not as it was written, or weights or code were added.

    Folders without a manifest pass.

    Args:
        folder: a model folder.
        weights: read the weights too, and compare them with their checksums.
    """
    path = folder / NAME
    if not path.exists():
        return
    manifest = read_json(path)
    version, files = manifest.get("format"), manifest.get("sha256")
    if version != FORMAT or isinstance(version, bool):
        raise CheckpointError(
            f"{path}: expected format {FORMAT}, got {version!r:.40}: "
            "made by another version of prunekit, or damaged"
        )
    if not isinstance(files, dict) or not {"config.json", "module.json"} & files.keys():
        raise CheckpointError(f"{path}: damaged: expected the checksums of the folder's files")
    if added := sorted(_names(folder, *_LOADED) - files.keys()):
        raise CheckpointError(
            f"{folder}: damaged model folder: {added[0]} was added after it was saved (see {NAME})"
        )
    for name, expected in files.items():
        check_name(path, name)
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: damaged model folder: {name} is missing")
        if (weights or not Path(name).match(_WEIGHTS)) and checksum(folder / name) != expected:
            raise CheckpointError(
                f"{folder}: damaged model folder: {name} is not as it was saved (see {NAME})"
            )


def _names(folder: Path, *patterns: str) -> set[str]:
    return {path.name for pattern in patterns for path in folder.glob(pattern)}
