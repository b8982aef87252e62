"""Small tools to watch a forward pass, to end it early, or to answer in place of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from prunekit.runtime.modes import keep_attributes, restoring


class Stop(Exception):
    """Ends a forward pass of which everything needed has been seen."""


@contextmanager
def replacing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the `with` block the module has another forward method."""
    with restoring(keep_attributes([module], "forward")):
        module.forward = forward  # type: ignore[method-assign]
        yield


def return_always(value: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward method, once `value` is bound to it, that returns this value."""
    return value
