"""Expected loss: the cut is spread so that the second-order estimate of the loss rises least.

Cutting the columns S of a consumer whose outputs y lose ε raises the loss by about ½ E[εᵀ G ε],
with G = E[δ δᵀ], δ = ∂L/∂y: the Fisher information of the outputs, which stands for the Hessian of
the loss (K-FAC, Martens and Grosse 2015). In the order in which Optimal Brain Surgeon takes the
units of a group, each after the repair of those before it, that is a curve for each group; the
least sum of all curves at the limit says how much each group loses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from prunekit.calibration.consumers import find_lone_consumer
from prunekit.calibration.gradients.loss import mean_loss
from prunekit.errors import DataError, expect_one_of
from prunekit.graph import Group
from prunekit.importance import Obs
from prunekit.policies.base import Policy, Setting
from prunekit.policies.knapsack import Point, spread_saving
from prunekit.policies.ramp import LogIncrease
from prunekit.runtime.console import say
from prunekit.runtime.modes import at_rest

Information = Literal["diagonal", "full"]

_POINTS = 64  # of a curve, at most
_LEAST = 1e-6  # a share of zero would leave the group out of the cut


@dataclass(frozen=True, kw_only=True)
class ExpectedLoss(Policy):
    """Each group loses what raises the loss least, by the Fisher information of its outputs.

    It does not matter what will choose the units. Streamed layers, models without a loss, and
    groups that several matrices read have no such estimate: shares then rise with the depth.

    Args:
        outputs: full: all products of the loss's gradients; diagonal: their squares alone.
    """

    measures: ClassVar[bool] = True
    stands_in: ClassVar[bool] = True
    outputs: Information = "full"

    def __post_init__(self) -> None:
        expect_one_of("policy.outputs", self.outputs, get_args(Information))

    def group_shares(self, setting: Setting) -> dict[str, float]:
        """The exact optimum, if errors of groups add up; by one backward and one layer-wise pass.

        Where the loss can't be had of all groups, the shares of `log_increase`; that is said.
        """
        if reason := _find_obstacle(setting):
            say(f"policy=expected_loss: {reason}: shares rise with the depth (log_increase)")
            return LogIncrease().group_shares(setting)
        return setting.tools.remember("expected_loss", lambda: self._measure(setting))

    def _measure(self, setting: Setting) -> dict[str, float]:
        importance = Obs(compete="loss", outputs=self.outputs)
        scores = importance.score(setting.model, setting.graph, setting.groups, setting.batches)
        curves = {group.name: _draw(setting, group, scores) for group in setting.groups}
        ratios = spread_saving(curves, setting.cost({}) - setting.limit)
        return {name: max(ratio, _LEAST) for name, ratio in ratios.items()}


def _find_obstacle(setting: Setting) -> str | None:
    """Why the loss, or its gradients at the outputs of every group, can't be had; None: they can.

    Processes that share the work agree, for all of them look at the same.
    """
    if any(parameter.is_meta for parameter in setting.model.parameters()):
        return "the layers are streamed, and gradients take all of them at once"
    for group in setting.groups:
        if not group.members or find_lone_consumer(setting.model, group) is None:
            return f"{group.name} has no single matrix that reads it, whose outputs count"
    try:
        with at_rest(setting.model), torch.no_grad():
            mean_loss(setting.model, setting.batches[0])
    except DataError as error:
        return str(error)
    return None


def _draw(setting: Setting, group: Group, scores: Mapping[str, Tensor]) -> list[Point]:
    """The curve of a group: what it saves, and what the loss rises by, up to its last unit but one.

    Units go by rising errors added, so that the curve is convex.
    """
    errors = scores[group.name].sort().values.cumsum(0).tolist()
    dense, step = setting.cost({}), -(-group.num_units // _POINTS)
    counts = [*range(step, group.num_units, step), group.num_units - 1]
    return [
        Point(0.0, 0.0, 0.0),
        *(
            Point(
                count / group.num_units,
                dense - setting.cost({group.name: count}),
                errors[count - 1],
            )
            for count in dict.fromkeys(counts)
            if count
        ),
    ]
