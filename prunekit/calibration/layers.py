"""Layers whose weights are not all in memory: the calls that a walk and a schedule make."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from prunekit.graph import Group


class Layers(Protocol):
    """Reads the weights of layers before they are needed, and takes them away afterwards.

    A walk enters and leaves the layers in order. In between the schedule says which units of the
    layer's groups it has removed, so that the layer can be cut as soon as it is left.
    """

    def outside(self) -> AbstractContextManager[Any]:
        """Inside the `with` block, all weights but those of the layers are in memory."""

    def enter(self, layer: int) -> None:
        """Bring the weights of a layer to memory."""

    def remove(self, group: Group, units: Sequence[int]) -> None:
        """Note the units that a group of the present layer has lost; their columns are zero."""

    def leave(self, layer: int) -> None:
        """Take a finished layer away."""
