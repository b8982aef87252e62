"""Versions of the packages that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Package → its version; "checkout" where it is not installed. Python is among them."""
    known = {"python": platform.python_version()}
    for name in ("prunekit", "torch", "transformers", "peft", "lm_eval"):
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            known[name] = "checkout"
    return known
