"""The strings on the command line: their keys, their choices, and errors about them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from prunekit.config.sections import RunConfig
from prunekit.errors import ConfigError, first_line, suggest

GROUPS = (
    "model",
    "data",
    "importance",
    "policy",
    "scope",
    "cost",
    "compensation",
    "schedule",
    "recovery",
    "eval",
    "export",
    "method",
    "experiment",
)
# Groups whose section names a class by `_target_`, and keys in it that are not the class's own.
BUILT: Mapping[str, tuple[str, ...]] = {
    "importance": (),
    "policy": (),
    "scope": (),
    "cost": (),
    "compensation": (),
    "schedule": (),
    "recovery": (),
    "export": ("remote_code", "push_to_hub", "private", "tensor_parallel"),
}
# What Hydra and OmegaConf say of some mistakes, and what of the types that they name.
_SEVERAL = re.compile(r"Ambiguous value for argument '(.*)'")
_MISSING = re.compile(r"Could not override '(.*)'")
_TYPE = re.compile(
    r"Value ('.*') (?:of type '\w+' could not be converted to (\w+)|is not a valid (\w+))"
)
_EXPECTED = {"Float": "a number", "Integer": "a whole number", "bool": "true or false"}
_FOLDERS = ("--config-dir", "-cd")  # flags of Hydra that add a folder to its search path


def split_overrides(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Key and value of each override: `+a.b=1` is `a.b` and `1`, `~a` is `a` and ``; no flags."""
    for override in overrides:
        key, _, value = override.partition("=")
        if not override.startswith("-") and (value or "=" in override or override[:1] == "~"):
            yield key.lstrip("+~"), value


def check_strings(overrides: object) -> None:
    """Raise ConfigError where overrides are no list of strings."""
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise ConfigError(f"overrides: expected a list of strings, got {overrides!r}")
    for override in overrides:
        if not isinstance(override, str):
            raise ConfigError(f"overrides: expected a list of strings, got {override!r} in it")


def check_choices(overrides: Sequence[str], folder: Path) -> None:
    """Raise ConfigError where an override names a key or a choice that `folder` doesn't have.

    Where folders were added to Hydra's search path, choices are left to Hydra (see `one_line`).
    """
    _check_search_path(overrides)
    known = {*GROUPS, "hydra", *(f.name for f in fields(RunConfig))}
    elsewhere = any(override.split("=")[0] in _FOLDERS for override in overrides)
    elsewhere |= any(key == "hydra.searchpath" for key, _ in split_overrides(overrides))
    for key, value in split_overrides(overrides):
        first = key.split(".")[0].split("/")[0].split("@")[0]
        if first not in known:
            raise ConfigError(f"unknown key {first!r}: {suggest(first, sorted(known))}")
        if key not in GROUPS or not value or "(" in value:
            continue
        available = sorted(path.stem for path in (folder / key).glob("*.yaml"))
        for choice in (part.strip() for part in value.strip("\"'").split(",")):
            if choice == "null" or not elsewhere and choice not in available:
                path = f"a model's folder or name on the hub is model.path={choice}; "
                hint = path if key == "model" and "/" in choice else ""
                raise ConfigError(
                    f"{key}: unknown choice {choice!r}: {hint}{suggest(choice, available)}"
                )


def _check_search_path(overrides: Sequence[str]) -> None:
    """Raise ConfigError where `hydra.searchpath` names a folder or a package that isn't there."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    for override in overrides:
        if override.partition("=")[0].lstrip("+") != "hydra.searchpath":
            continue
        try:
            places = OverridesParser.create().parse_override(override).value()
        except OverrideParseException:  # Hydra parses it again, and its message is shown
            continue
        for place in map(str, places if isinstance(places, list) else [places]):
            if "${" not in place and not _is_there(place):
                raise ConfigError(
                    "hydra.searchpath: expected folders, file://… or a path, and packages, "
                    f"pkg://…, that exist; {place} does not"
                )


def _is_there(place: str) -> bool:
    """Whether an entry of Hydra's search path exists; one of an unknown scheme is left to Hydra."""
    scheme, found, path = place.rpartition("://")
    if scheme == "pkg":
        try:
            spec = find_spec(path)
        except (ImportError, ValueError):
            return False
        return spec is not None and spec.submodule_search_locations is not None
    return Path(path).is_dir() if scheme == "file" or not found else True


def drop_presets(config: DictConfig, overrides: Sequence[str]) -> None:
    """Where an override sets a `_target_`, drop what the preset says about the class it replaces.

    `importance._target_=mypkg.Mine` begins with the defaults of that class: keys of the section
    stay only where an override sets them, or where they do not belong to the class.
    """
    given = [key for key, _ in split_overrides(overrides)]
    for name, common in BUILT.items():
        if f"{name}._target_" not in given or name not in config:
            continue
        kept = {"_target_", *common}
        kept |= {key.split(".")[1] for key in given if key.startswith(f"{name}.")}
        with open_dict(config):
            for key in [str(key) for key in config[name] if key not in kept]:
                del config[name][key]


def check_acted_on(
    overrides: Sequence[str], call: str, acted: Collection[str], instead: Mapping[str, str]
) -> None:
    """Raise ConfigError where an override sets what a call of the Python API does not act on.

    Args:
        overrides: the strings that were given.
        call: the name of the function, for the message.
        acted: dotted keys that the function acts on, with all that lies below them.
        instead: dotted key → what to do instead. The longest key that fits decides, be it of
            `acted` or of `instead`; `acted` has precedence over the same key in `instead`.
    """
    for key, value in split_overrides(overrides):
        parts = key.split(".")
        above = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        decides = next((name for name in above if name in acted or name in instead), None)
        if decides not in acted:
            advice = instead[decides] if decides else "leave it out"
            raise ConfigError(f"{key}={value}: {call} does not act on it; {advice}")


def one_line(error: BaseException) -> str:
    """The message of an error of Hydra or OmegaConf, in one line."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        return f"{group}: unknown choice {choice!r}: {suggest(choice, list(error.options))}"
    if isinstance(error, OverrideParseException):
        key, equals, _ = error.override.partition("=")
        if not equals:
            return f"expected KEY=VALUE, got {key!r}; --help says more"
        return f"{key}: can't read {error.override!r}; the value may need quotes: \"{key}='…'\""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if told := _told_better(error, lines[0] if lines else ""):
        return told
    cause = error.__cause__ if error.__cause__ is not error else None
    text = "; ".join(lines[:2]).replace("Could not override", "can't set")
    if cause and str(cause) and str(cause) not in text:
        return f"{text}: {first_line(cause)}"
    return text


def _told_better(error: BaseException, line: str) -> str | None:
    """Some mistakes by key, what was expected and what came; None: any other one."""
    if found := _SEVERAL.match(line):
        key = found[1].partition("=")[0]
        return f"{found[1]}: expected one value; with -m each is a run, and {key}=[…] is a list"
    cause = error.__cause__
    if (found := _MISSING.match(line)) and isinstance(cause, OmegaConfBaseException):
        return _unknown_key(found[1], str(cause.key), [str(key) for key in cause.parent_node or ()])
    found = _TYPE.match(line)
    if found and isinstance(error, OmegaConfBaseException) and error.full_key:
        named = found[2] or found[3]
        return f"{error.full_key}: expected {_EXPECTED.get(named, named)}, got {found[1]}"
    return None


def _unknown_key(key: str, last: str, beside: Sequence[str]) -> str | None:
    """What to say of a key that the composed configuration lacks; None where it has no section.

    Args:
        key: the dotted key.
        last: the part of it that is unknown.
        beside: the keys that are there in its place.
    """
    if not beside:
        return None
    own = [name for name in beside if name != "_target_"]
    chosen = f" of the chosen {key.partition('.')[0]}" if len(own) < len(beside) else ""
    advice = suggest(last, own) if own else "it has no options"
    return f"unknown key {key!r}{chosen}: {advice}"
