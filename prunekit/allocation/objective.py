"""What counts, and what it must come down to: from the options `cost`, `ratio` and `target`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prunekit.allocation.costs.base import Cost, CostModel, CostSetting
from prunekit.allocation.costs.bytes import Bytes
from prunekit.allocation.costs.flops import Flops
from prunekit.allocation.costs.latency import Latency
from prunekit.allocation.costs.parameters import Parameters
from prunekit.config import RunConfig, TargetConfig
from prunekit.errors import ConfigError

_COSTS: tuple[type[CostModel], ...] = (Parameters, Bytes, Flops, Latency)
_BY_MEASURE = {cost.name: cost for cost in _COSTS}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The `limit` that `cost` must come down to, and the `option` that sets it, for messages."""

    cost: Cost
    limit: float
    option: str


def select_cost(cost: CostModel, target: TargetConfig) -> CostModel:
    """The configured cost; or the cost of the measure that a limit of `target` is given in.

    Raises:
        ConfigError: a limit in one measure, and a cost that counts another one.
    """
    measure = target.measure
    if measure is None or measure == cost.name:
        return cost
    if not cost.yields:
        raise ConfigError(
            f"target.{measure}: expected cost={measure}, or a target.limit in the units of "
            f"cost={cost.name}"
        )
    return _BY_MEASURE[measure].for_target(tokens=target.tokens, batch=target.batch)


def set_objective(
    model: CostModel,
    setting: CostSetting,
    config: RunConfig,
    shape: Mapping[str, int] | None = None,
) -> Objective:
    """Measure the cost of the dense model; the limit is given, or a share of the measured cost.

    Where the shape is given, as how many units of each group go, the limit is what it costs.

    Raises:
        ConfigError: whole layers are to go, and the cost can't count them.
    """
    whole_layers = not all(group.multiply_adds_known for group in setting.groups)
    if whole_layers and not model.counts_layers:
        raise ConfigError(
            f"cost={model.name}: it can't be told for whole layers (groups=layer): expected "
            "cost=parameters or cost=bytes"
        )
    cost = model.measure(setting)
    if shape is not None:
        return Objective(cost=cost, limit=cost(shape), option="target_shape")
    for name, limit in config.target.given.items():
        return Objective(cost=cost, limit=limit, option=f"target.{name}")
    return Objective(cost=cost, limit=cost({}) * (1 - config.ratio), option="ratio")
