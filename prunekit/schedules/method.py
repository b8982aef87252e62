"""A method: the backends that choose units and repair what stays, built once for a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import PurePath
from types import EllipsisType, MemberDescriptorType
from typing import Any, TypeVar

import torch
from torch import Tensor

from prunekit.allocation.costs.base import CostModel
from prunekit.allocation.costs.parameters import Parameters
from prunekit.allocation.objective import select_cost
from prunekit.allocation.scope import Scope
from prunekit.compensation.base import Compensation
from prunekit.config import ApiCall, RunConfig, build_as, check
from prunekit.errors import ConfigError
from prunekit.importance.base import Importance
from prunekit.policies.base import Policy
from prunekit.runtime.files import digest
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

    @property
    def needs_matrices(self) -> bool:
        """Whether a group can only be cut if its consumers are matrices, whose inputs are seen."""
        return self.compensation is not None or self.schedule.layerwise

    @classmethod
    def build(cls, config: RunConfig, given: Mapping[str, Backend] | None = None) -> Method:
        """Build the backends that a configuration names; some may be `given` as objects instead.

        Raises:
            ConfigError: a backend's option out of range, a class of another kind, none at all.
        """
        given = given or {}
        importance = _require(Importance, config, given, "importance")
        if importance.at_once is None and importance.by_layer is None:
            kind = type(importance)
            raise ConfigError(
                "importance: expected a subclass of ScoreImportance or LayerImportance, got "
                f"{kind.__module__}.{kind.__qualname__}, which is neither"
            )
        policy = _require(Policy, config, given, "policy")
        scope = build_as(Scope, config.scope, "scope") or Scope()
        if scope.min_units is None:
            scope = replace(scope, min_units=0 if policy.empties else 1)
        return cls(
            importance=importance,
            policy=policy,
            compensation=_find(Compensation, config, given, "compensation"),
            schedule=_require(Schedule, config, given, "schedule"),
            scope=scope,
            cost=select_cost(
                _find(CostModel, config, given, "cost") or Parameters(), config.target
            ),
        )


def compose_pruning(
    call: ApiCall,
    method: str,
    ratio: float | None,
    choices: Mapping[str, str | Backend | None],
    compensation: str | Compensation | EllipsisType | None,
    overrides: Sequence[str],
    *,
    keeps_state: bool = False,
) -> tuple[RunConfig, dict[str, Backend]]:
    """Compose and check the configuration of a call that prunes.

    A run that `keeps_state`, or goes on from one, takes only backends that it can write down.

    Returns:
        The configuration, and the backends that were given as objects.

    Raises:
        ConfigError: an unknown choice; an option of a backend that was given as an object; an
            object that can't be told from others, where a state is asked for.
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
    describe_objects(config, backends, whole=keeps_state or config.resume)
    return config, backends


def _split_choices(
    choices: Mapping[str, str | Backend | None],
) -> tuple[dict[str, str], dict[str, Backend]]:
    """Tell names from objects: section → choice, and section → backend; None was not given."""
    given = {name: choice for name, choice in choices.items() if choice is not None}
    names = {name: choice for name, choice in given.items() if isinstance(choice, str)}
    backends = {name: choice for name, choice in given.items() if not isinstance(choice, str)}
    return names, backends


def describe_objects(
    config: RunConfig, objects: Mapping[str, object], *, whole: bool = False
) -> None:
    """Write into the sections of the configuration which objects take their place.

    The state and the record of a run read these sections without building them. Where the `whole`
    content must be there, an attribute that can't be written down is an error; else its type stands
    in its place, so that no run goes on from a state of which not everything is known.
    """
    for name, given in objects.items():
        kind = type(given)
        section: dict[str, Any] = {"_target_": f"{kind.__module__}.{kind.__qualname__}"}
        for key, value in _attributes(given).items():
            try:
                section[key] = _describe(value, f"{name}.{key}")
            except ConfigError:
                if whole:
                    raise
                section[key] = f"{type(value).__name__}, which can't be written down"
        setattr(config, name, section)


def _attributes(given: object) -> dict[str, object]:
    """The attributes of an object, those in slots too."""
    slots = [
        name
        for kind in type(given).__mro__
        for name, part in vars(kind).items()
        if isinstance(part, MemberDescriptorType)
    ]
    kept = {slot: getattr(given, slot) for slot in slots if hasattr(given, slot)}
    return {**kept, **getattr(given, "__dict__", {})}


def _describe(value: object, key: str) -> object:
    """A value in JSON's types that tells it from others; a tensor becomes a digest.

    Raises:
        ConfigError: a value of another kind, such as a function.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_describe(part, f"{key}.{i}") for i, part in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(name, str | int) for name in value):
        # An empty mapping would vanish from the flat facts of a state.
        parts = {str(name): _describe(part, f"{key}.{name}") for name, part in value.items()}
        return parts or "{}"
    if is_dataclass(value) and not isinstance(value, type):
        return _describe({own.name: getattr(value, own.name) for own in fields(value)}, key)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        flat = value.detach().cpu().contiguous().flatten()
        content = flat.view(torch.uint8).numpy().data if flat.numel() else b""
        return f"tensor {digest([f'{value.dtype} {tuple(value.shape)}', content])}"
    raise ConfigError(
        f"{key}: expected a number, text, path, tensor, list or mapping, which a state can hold, "
        f"got a {type(value).__name__}; leave out state= and resume=true"
    )


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
