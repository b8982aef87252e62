"""The embedded corpus: text that every Python installation carries, split by a hash of names.



One document per standard-library module (its source, docstrings included) and one per `pydoc`
topic. Tests, data tables (`encodings`) and installed packages are left out. A name keeps its side
of the split on every Python version.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
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
    for name, text in sorted([*_modules(), *_topics()]):
        if text.strip() and split_of(name) == split:
            yield name, text


def _modules() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts) and not any(
            p.startswith(_SKIPPED_PREFIXES) for p in relative.parts
        ):
            yield relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"pydoc/{name}", text
