"""The changes that a cut makes in a model, and how they are undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Guess:
    """An attribute that was changed only because its value was a size that the cut changes."""

    target: nn.Module
    attribute: str
    old: int
    new: int

    def revert(self) -> None:
        """Give the attribute its old value."""
        setattr(self.target, self.attribute, self.old)

    def repeat(self) -> None:
        """Give the attribute its new value again."""
        setattr(self.target, self.attribute, self.new)


@dataclass(eq=False)
class Changes:
    """Everything that one cut changed.

    It holds the uncut weights: let go of it once the cut model is checked.
    """

    model: nn.Module
    guesses: list[Guess] = field(default_factory=list)
    _ways_back: list[Callable[[], None]] = field(default_factory=list)
    _settled: set[tuple[int, str]] = field(default_factory=set)

    def undo(self) -> None:
        """Put everything back, the latest change first; a second call does nothing."""
        while self._ways_back:
            self._ways_back.pop()()

    def set(self, target: Any, name: str, value: Any) -> None:
        """Change an attribute."""
        before = getattr(target, name)
        self._ways_back.append(lambda: setattr(target, name, before))
        self._settled.add((id(target), name))
        setattr(target, name, value)

    def guess(self, target: nn.Module, name: str, value: int) -> None:
        """Change an attribute only because its value is a size that the cut changes (`Guess`).

        One that has changed already is left as it is: its value is no old size any more.
        """
        if (id(target), name) in self._settled:
            return
        old = getattr(target, name)
        self.set(target, name, value)
        self.guesses.append(Guess(target=target, attribute=name, old=old, new=value))

    def persist(self, module: nn.Module, buffer: str) -> None:
        """Make a buffer part of the state dict: the class of the module would make it uncut."""
        if buffer in module._non_persistent_buffers_set:
            self._ways_back.append(lambda: module._non_persistent_buffers_set.add(buffer))
            module._non_persistent_buffers_set.discard(buffer)

    def remember_configs(self, config: Any) -> None:
        """Note a config's values and which config each module holds, before they change."""
        values = dict(config.__dict__)
        holders = [(m, m.config) for m in self.model.modules() if "config" in m.__dict__]

        def restore() -> None:
            config.__dict__.clear()
            config.__dict__.update(values)
            for module, own in holders:
                module.config = own

        self._ways_back.append(restore)
