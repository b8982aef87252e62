"""Find `conf/`, compose it with Hydra and check it; torch is not imported for this."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from prunekit.config.overrides import (
    check_choices,
    drop_presets,
    one_line,
    split_overrides,
)
from prunekit.config.sections import LIMITS, RunConfig, kinds_of
from prunekit.errors import ConfigError, expect_one_of, suggest


def config_dir() -> Path:
    """The folder of the configuration: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def compose(overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration that the command line would compose from these overrides.

    Equal overrides are composed once, unless they change Hydra's search path.

    Raises:
        ConfigError: an unknown key or choice, a value of the wrong type.
    """
    check_choices(overrides, config_dir())
    elsewhere = any(key.startswith("hydra.") for key, _ in split_overrides(overrides))
    compose_anew = _compose.__wrapped__ if elsewhere else _compose
    return copy.deepcopy(compose_anew(config_dir(), tuple(overrides)))


@functools.lru_cache(maxsize=256)
def _compose(folder: Path, overrides: tuple[str, ...]) -> DictConfig:
    """Hydra's configuration of the overrides, which takes it a tenth of a second."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    running = GlobalHydra.instance().is_initialized()
    state = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            config: DictConfig = hydra.compose("config", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    finally:
        if running:
            GlobalHydra.instance().hydra = state
    settle(config, overrides)
    return config


def settle(config: DictConfig, overrides: Sequence[str]) -> None:
    """Finish what Hydra composed of these overrides, in place: what no defaults list can say."""
    _expect_sections(config, _schema())
    drop_presets(config, overrides)
    _expect_one_target(config, overrides)
    _take_default_data(config, overrides)


def _expect_one_target(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError where the user asks for a ratio, and for a target instead of it."""
    limits = [name for name in LIMITS if OmegaConf.select(config, f"target.{name}") is not None]
    if limits and any(key == "ratio" for key, _ in split_overrides(overrides)):
        raise ConfigError(f"expected either ratio or target.{limits[0]}, got both")


def _take_default_data(config: DictConfig, overrides: Sequence[str]) -> None:
    """Calibrate on the data that the presets of the method and of the model name.

    The embedded model keeps its own text, and so does a run whose text is chosen, by an override
    or by a preset: `default_data` is empty then. Numbers that overrides give (of samples, say)
    take precedence over the preset's.
    """
    text = config.data.calibration
    given = {key.removeprefix("data.calibration.") for key, _ in split_overrides(overrides)}
    chosen = bool(given & {"data", "corpus", "path", "mix"}) or text.corpus != "embedded"
    if not config.default_data or chosen or config.model.path is None:
        config.default_data = None
        return
    expect_one_of("default_data", config.default_data, _choices("data"), "choice ")
    preset: Any = OmegaConf.load(config_dir() / "data" / f"{config.default_data}.yaml")
    text.merge_with({k: v for k, v in preset.calibration.items() if k not in given})


def _choices(group: str) -> tuple[str, ...]:
    """The names of a group's choices in `conf/`."""
    return tuple(sorted(path.stem for path in (config_dir() / group).glob("*.yaml")))


def check(config: DictConfig) -> RunConfig:
    """Check the configuration, and return it as typed dataclasses.

    Raises:
        ConfigError: names the key, what was expected and what came.
    """
    container: Any = OmegaConf.to_container(config, resolve=False)
    plain = OmegaConf.create({key: value for key, value in container.items() if key != "hydra"})
    lists = ("plans", "imports", "vocabulary.corpora", "eval.corpora", "eval.tasks", "eval.prompts")
    for key in lists:
        if isinstance(value := OmegaConf.select(plain, key), str):  # a single one needs no brackets
            OmegaConf.update(plain, key, [value])
    known = {f.name for f in fields(RunConfig)}
    if unknown := [str(key) for key in plain if key not in known]:
        raise ConfigError(f"unknown key {unknown[0]!r}: {suggest(unknown[0], sorted(known))}")
    try:
        run: Any = OmegaConf.to_object(OmegaConf.merge(_schema(), plain))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: expected a value, e.g. {error.full_key}=…") from error
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    if run.eval.baseline is not None and run.task not in ("evaluate", "recover"):
        raise ConfigError(
            f"eval.baseline={run.eval.baseline}: task={run.task} does not act on it; only "
            "task=evaluate and task=recover measure another model beside"
        )
    if run.vocabulary.corpora and "vocabulary" not in kinds_of(run.groups):
        raise ConfigError(
            f"vocabulary.corpora={run.vocabulary.corpora}: groups={run.groups} does not act on it; "
            "expected groups=vocabulary, or a list with it"
        )
    return run


def _expect_sections(found: DictConfig, schema: DictConfig, within: str = "") -> None:
    """Raise ConfigError where a value stands in the place of a section with options."""
    sections = dict(schema.items_ex(resolve=False))
    for key, own in found.items_ex(resolve=False):
        name, wanted = f"{within}{key!s}", sections.get(key)
        if not isinstance(wanted, DictConfig) or not wanted:  # one value, or options of any names
            continue
        if isinstance(own, DictConfig):
            _expect_sections(own, wanted, f"{name}.")
        else:
            option = str(next(iter(wanted)))
            raise ConfigError(f"{name}: expected options, such as {name}.{option}=…, got {own!r}")


@functools.cache
def _schema() -> DictConfig:
    """The sections as OmegaConf's schema, which a merge copies before it changes it."""
    schema: DictConfig = OmegaConf.structured(RunConfig)
    return schema


def flat(section: object, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value, for all that lies in a section."""
    if not isinstance(section, dict):
        return {prefix: section}
    flattened: dict[str, Any] = {}
    for key, value in section.items():
        flattened |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flattened
