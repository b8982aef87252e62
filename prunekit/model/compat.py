"""Every place where something of transformers is worked around, each with its reason and the
version it was seen in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def unvalidated(config: Any) -> Iterator[None]:
    """Let the config be written although its class refuses some of its layers' sizes (a head count
    that doesn't divide the hidden size, say).
    """

    def write(directory: str | Path, **_: Any) -> None:
        config.__dict__.pop("save_pretrained", None)
        config.to_json_file(Path(directory) / "config.json", use_diff=True)

    config.__dict__["save_pretrained"] = write
    try:
        yield
    finally:
        config.__dict__.pop("save_pretrained", None)
