"""Seeds that depend on everything that they are for, and on nothing else that is drawn."""

from __future__ import annotations

import hashlib


def seed_of(*parts: object) -> int:
    """A seed of 56 bits for these parts, each by its text."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
