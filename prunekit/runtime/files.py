"""Files and folders that appear whole or not at all, and digests of their content."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prunekit.errors import CheckpointError


def digest(parts: Iterable[str | bytes | memoryview]) -> str:
    """32 hexadecimal digits of a SHA-256 over parts, which tells ("ab", "c") from ("a", "bc")."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "little"))
        hashed.update(data)
    return hashed.hexdigest()[:32]


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which is renamed to it at the end of the `with` block.

    After an error the temporary folder is removed.

    Raises:
        CheckpointError: `target` exists and is not empty, or can't be written.
    """
    check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target}: can't be written: {error.strerror}") from error
    with disk_errors(target):
        try:
            yield temporary
            publish(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_free(target: Path) -> None:
    """Raise CheckpointError where a folder that is to be written exists and holds anything."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"{target}: expected a new or empty folder, found one with files in it"
        )


def publish(temporary: Path, target: Path) -> None:
    """Let a finished temporary folder become `target`, which is missing or empty."""
    temporary.chmod(0o755)
    for file in temporary.iterdir():
        file.chmod(0o644)
    if target.exists():
        target.rmdir()
    temporary.replace(target)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn errors of a disk that is full or forbids writing into a CheckpointError.

    Args:
        target: the file or folder that the message names.
    """
    try:
        yield
    except BaseException as error:
        if _is_disk(error):
            raise CheckpointError(f"{target}: can't be written: {error}") from error
        raise


def _is_disk(error: BaseException) -> bool:
    """Whether an error means that the disk is full or forbids writing.

    safetensors wraps errors of the system in its own, of which only the text tells.
    """
    codes = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG, errno.EIO}
    if isinstance(error, OSError):
        return error.errno in codes
    return type(error).__name__ == "SafetensorError" and "os error" in str(error).lower()


def write_text(path: Path, text: str) -> None:
    """Write a small file as a whole: at any time it holds the old text or the new one.

    Raises:
        CheckpointError: it can't be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: can't be written: {error.strerror}") from error


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
