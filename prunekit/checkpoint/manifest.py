"""The manifest of a saved model folder: checksums of what the model is made of, so that damage is seen before use."""

import hashlib
import json
from pathlib import Path

from prunekit.errors import CheckpointError

NAME = "prunekit.json"
FORMAT = 1


def write_manifest(folder: Path) -> None:
    """Write `prunekit.json`: format version, and the SHA-256 of `config.json`, of every weight file and of code."""
    files = {path.name: checksum(path) for path in sorted(_covered(folder))}
    (folder / NAME).write_text(json.dumps({"format": FORMAT, "sha256": files}, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> None:
    """Raise CheckpointError where a file is not as it was written; folders without a manifest pass."""
    path = folder / NAME
    if not path.exists():
        return
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files = manifest["format"], dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {version!r}: made by another version of prunekit")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: damaged model folder: {name} is missing")
        if checksum(folder / name) != expected:
            raise CheckpointError(f"{folder}: damaged model folder: {name} is not as it was saved (see {NAME})")


def _covered(folder: Path) -> list[Path]:
    patterns = ("*.safetensors", "*.safetensors.index.json", "*.py")
    return [folder / "config.json", *(path for pattern in patterns for path in folder.glob(pattern))]


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
