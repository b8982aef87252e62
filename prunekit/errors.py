"""The errors a user can cause; the command line prints their message and exits with status 2."""

from collections.abc import Sequence


class PrunekitError(Exception):
    """A mistake in a request: the message says what was expected, what came, and where."""


class ConfigError(PrunekitError):
    """A configuration that can't be composed or lies out of range."""


class DataError(PrunekitError):
    """A corpus, a batch or an activation that can't be used."""


class TraceError(PrunekitError):
    """A model the tracer can't follow, or a plan that doesn't fit its graph."""


class SurgeryError(PrunekitError):
    """A cut that did not leave the masked model's outputs; the model was put back."""


class CheckpointError(PrunekitError):
    """A model folder that is missing, damaged, or already in the way."""


class ExportError(PrunekitError):
    """A model that an export's format can't express, or a package that the export lacks."""


def suggest(name: str, available: list[str]) -> str:
    """The tail of an unknown-name message: the nearest names, then all of them."""
    from difflib import get_close_matches

    named = {known.lower(): known for known in available}
    near = [named[known] for known in get_close_matches(name.lower(), named, n=2, cutoff=0.5)]
    did_you_mean = f"did you mean {' or '.join(near)}? " if near else ""
    shown = sorted(available)
    more = f", … ({len(shown) - 24} more)" if len(shown) > 24 else ""
    return f"{did_you_mean}available: {', '.join(shown[:24])}{more}"


def expect_one_of(key: str, value: object, known: Sequence[str], what: str = "") -> None:
    """Raise ConfigError where the value of a setting is not a known one.

    Args:
        key: the setting, for the message.
        value: its value.
        known: the values that it may have.
        what: a word before the value in the message, with a space behind it.
    """
    if value not in known:
        raise ConfigError(f"{key}: unknown {what}{value!r}: {suggest(str(value), list(known))}")


def first_line(error: BaseException, *, named: bool = False) -> str:
    """An error in one line; `named` puts its type before the message.

    That line is the message's first, with the next one where it ends in a colon: "install it by:".
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    kind = type(error).__name__
    if not lines:
        return kind
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{kind}: {text}" if named else text
