"""The embedded corpus: text that every Python installation carries, split by a hash of names.



One document per standard-library module (its source, docstrings included) and one per `pydoc`
topic. Tests, data tables (`encodings`) and installed packages are left out. A name keeps its side
of the split on every Python version.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 16  # one document in 16 is held out
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "encodings",
    "__pycache__",
    "lib-dynload",
}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "idle_test", "topics.py")


def split_of(name: str) -> Split:
    """Which side of the split the document called `name` is on: a function of the name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0 else "train"


def documents(split: Split) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document on one side of the split, sorted by name."""
    readers = {name: read for name, read in [*_modules(), *_topics()] if split_of(name) == split}
    for name in sorted(readers):
        if (text := readers[name]()).strip():
            yield name, text


def _modules() -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name of each module's file and what reads it; skipped folders are not entered."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _is_skipped(name)]
        for name in files:
            if name.endswith(".py") and not _is_skipped(name):
                path = Path(folder, name)
                read = partial(path.read_text, encoding="utf-8", errors="replace")
                yield path.relative_to(root).as_posix(), read


def _is_skipped(name: str) -> bool:
    return name in _SKIPPED or name.startswith(_SKIPPED_PREFIXES)


def _topics() -> Iterator[tuple[str, Callable[[], str]]]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"pydoc/{name}", partial(str, text)
