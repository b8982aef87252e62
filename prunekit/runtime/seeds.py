"""Random numbers that depend on a seed and a name alone, not on what else is drawn."""

import hashlib

from torch import Generator


def make_generator(seed: int, name: str) -> Generator:
    """A generator on the CPU for this seed and the name of what is drawn for."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:7], "big"))
