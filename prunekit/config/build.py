"""Build the objects that sections of the configuration name; import the modules of users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

from prunekit.config.overrides import one_line
from prunekit.errors import ConfigError, PrunekitError

T = TypeVar("T")


def build(section: Mapping[str, Any], name: str) -> Any:
    """Build the object that a section's `_target_` names; None where it names none.

    Raises:
        ConfigError: the class can't be imported, or its arguments don't fit.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if section.get("_target_") is None:
        return None
    try:
        return instantiate(dict(section), _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, PrunekitError):
            raise error.__cause__ from None
        raise ConfigError(f"{name}: {one_line(error)}") from error


def build_as(kind: type[T], section: Mapping[str, Any], name: str) -> T | None:
    """Build the object that a section names, and check its class; None where it names none.

    Raises:
        ConfigError: as `build`; or an object of another kind.
    """
    backend = build(section, name)
    if backend is not None and not isinstance(backend, kind):
        raise ConfigError(
            f"{name}: expected a subclass of {kind.__module__}.{kind.__qualname__}, "
            f"got {section['_target_']}"
        )
    return backend


def import_modules(names: Sequence[str]) -> None:
    """Import the modules of `imports`, for what they register: operator rules, say.

    Raises:
        ConfigError: one that can't be imported.
    """
    for name in names:
        try:
            import_module(name)
        except Exception as error:  # whatever the code of a user's module raises
            reason = one_line(error) or type(error).__name__
            raise ConfigError(
                f"imports: expected modules that Python can import, got {name}: {reason}"
            ) from error
