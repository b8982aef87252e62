"""The base of exports: a model is checked before any work; its file appears whole or not at all."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

from prunekit.errors import CheckpointError, ExportError
from prunekit.runtime.console import say
from prunekit.runtime.files import disk_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Written:
    """What an export made.

    Attributes:
        file: the file that a reader opens; the target, or a file in it where that is a folder.
        about: the facts that a user is told of it, in a few words.
    """

    file: Path
    about: str


@dataclass(frozen=True, kw_only=True)
class Export(ABC):
    """A format that other programs read.

    A subclass is a frozen dataclass whose fields are its options, checked in `__post_init__`.


    Attributes:
        name: the name that messages give the format, as in `export=gguf`.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def target(self) -> str:
        """The name of the file or folder that `write` leaves."""

    @abstractmethod
    def check_model(self, model: PreTrainedModel) -> None:
        """Raise ExportError where the format can't hold the model, or where a package is missing.

        It is called before a model is pruned, and must say only what pruning can't change.
        """

    @abstractmethod
    def create(
        self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Written:
        """Make the file or folder `path`, which lies in an empty temporary folder.

        Raises:
            ExportError: the format can't hold this model or its tokenizer.
        """

    def write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> Path:
        """Write `folder/<target>`: all of it or nothing.

        Args:
            model: a causal language model of transformers, dense or pruned; it is left as it was.
            tokenizer: its fast tokenizer.
            folder: a folder; it is made where it is missing.

        Returns:
            The path of the file that a reader opens.

        Raises:
            ExportError: the format can't hold the model, a package is missing, or the target is
                there already.
            CheckpointError: the disk is full or forbids writing.
        """
        self.check_model(model)
        target = Path(folder) / self.target
        if target.exists():
            raise ExportError(f"{target}: exists already; expected a folder without it")
        with _appear_whole(target) as temporary:
            written = self.create(temporary, model, tokenizer)
        parts = target.rglob("*") if target.is_dir() else [target]
        size = sum(part.stat().st_size for part in parts if part.is_file())
        file = target / written.file.relative_to(temporary)
        say(f"{file}: {written.about}, {size / 1e6:.1f} MB")
        return file


@contextmanager
def _appear_whole(target: Path) -> Iterator[Path]:
    """A path in a temporary folder beside `target`; what the block makes there becomes `target`.

    On an error it vanishes, with the folders that were made for it.
    """
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: can't be written: {error.strerror}") from error
    with disk_errors(target):
        try:
            yield Path(beside) / target.name
            (Path(beside) / target.name).replace(target)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            for folder in missing:
                with suppress(OSError):  # another process uses the folder now
                    folder.rmdir()
            raise
        shutil.rmtree(beside, ignore_errors=True)


def require_package(package: str, export: str) -> ModuleType:
    """The module of an optional package; ExportError where it is not installed.

    Args:
        package: its name.
        export: the name of the export that needs it, and of the extra that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ExportError(
            f"export={export} needs the package {package}: pip install prunekit[{export}]"
        ) from None
