"""A method: the backends that choose units and repair what stays, built once for a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeVar

from prunekit.allocation.costs.base import CostModel
from prunekit.allocation.costs.parameters import Parameters
from prunekit.allocation.objective import select_cost
from prunekit.allocation.scope import Scope
from prunekit.compensation.base import Compensation
from prunekit.config import Call, RunConfig, build_as, check
from prunekit.errors import ConfigError
from prunekit.importance.base import Importance
from prunekit.policies.base import Policy
from prunekit.schedules.base import Schedule

Backend = Importance | Policy | Compensation | Schedule | CostModel
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Method:
    """The backends that `method`, or the choices for its parts, stand for.

    Attributes:
        importance: tells which units matter least.
        policy: says how much is cut where.
        compensation: repairs the weights that stay; None: they are left as they are.
        schedule: who is chosen when.
        scope: what a cut may touch.
        cost: what counts: parameters, bytes, FLOPs, …
    """

    importance: Importance
    policy: Policy
    compensation: Compensation | None
    schedule: Schedule
    scope: Scope
    cost: CostModel

    @classmethod
    def build(cls, config: RunConfig, given: Mapping[str, Backend] | None = None) -> Method:
        """Build the backends that a configuration names; some may be `given` as objects instead.

        Raises:
            ConfigError: a backend's option out of range, a class of another kind, none at all.
        """
        given = given or {}
        return cls(
            importance=_require(Importance, config, given, "importance"),
            policy=_require(Policy, config, given, "policy"),
            compensation=_find(Compensation, config, given, "compensation"),
            schedule=_require(Schedule, config, given, "schedule"),
            scope=build_as(Scope, config.scope, "scope") or Scope(),
            cost=select_cost(
                _find(CostModel, config, given, "cost") or Parameters(), config.target
            ),
        )


def compose_pruning(
    call: Call,
    method: str,
    ratio: float | None,
    choices: Mapping[str, str | Backend | None],
    compensation: str | Compensation | EllipsisType | None,
    overrides: Sequence[str],
) -> tuple[RunConfig, dict[str, Backend]]:
    """Compose and check the configuration of a call that prunes.

    Returns:
        The configuration, and the backends that were given as objects.

    Raises:
        ConfigError: an unknown choice; an option of a backend that was given as an object.
    """
    if compensation is None:
        choices = {**choices, "compensation": "none"}
    elif not isinstance(compensation, EllipsisType):
        choices = {**choices, "compensation": compensation}
    names, backends = _split_choices(choices)
    for section in backends:
        call = call.with_object(section)
    arguments = {"method": method, **names}
    if ratio is not None:
        arguments["ratio"] = str(ratio)
    config = check(call.compose(overrides, arguments))
    describe_objects(config, backends)
    return config, backends


def _split_choices(
    choices: Mapping[str, str | Backend | None],
) -> tuple[dict[str, str], dict[str, Backend]]:
    """Tell names from objects: section → choice, and section → backend; None was not given."""
    given = {name: choice for name, choice in choices.items() if choice is not None}
    names = {name: choice for name, choice in given.items() if isinstance(choice, str)}
    backends = {name: choice for name, choice in given.items() if not isinstance(choice, str)}
    return names, backends


def describe_objects(config: RunConfig, objects: Mapping[str, object]) -> None:
    """Write into the sections of the configuration which objects take their place.

    The state and the record of a run read these sections without building them.
    """
    for name, given in objects.items():
        attributes = getattr(given, "__dict__", {})
        options = {key: value for key, value in attributes.items() if _is_plain(value)}
        kind = type(given)
        setattr(config, name, {"_target_": f"{kind.__module__}.{kind.__qualname__}", **options})


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, str | int | float)


def _find(kind: type[T], config: RunConfig, given: Mapping[str, Backend], name: str) -> T | None:
    """The backend that was given for a section, else the one that the section names, if any."""
    if name not in given:
        return build_as(kind, getattr(config, name), name)
    backend = given[name]
    if not isinstance(backend, kind):
        raise ConfigError(
            f"{name}: expected a name, or an object of a subclass of "
            f"{kind.__module__}.{kind.__qualname__}, got {backend!r}"
        )
    return backend


def _require(kind: type[T], config: RunConfig, given: Mapping[str, Backend], name: str) -> T:
    """As `_find`; ConfigError where neither an object was given nor the section names one."""
    backend = _find(kind, config, given, name)
    if backend is None:
        raise ConfigError(f"{name}: expected one, got none; {name}=… names one")
    return backend
