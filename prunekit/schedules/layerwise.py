"""The schedule of SlimGPT: each layer is pruned on the outputs of the pruned layers before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunekit.errors import ConfigError
from prunekit.importance.base import Importance
from prunekit.plan import PruningPlan
from prunekit.schedules.base import Assignment, Schedule
from prunekit.schedules.choose import choose_by_score
from prunekit.schedules.repair import cut_groups


@dataclass(frozen=True, kw_only=True)
class Layerwise(Schedule):
    """Groups are cut in execution order, each on the inputs that the pruned groups before it give.

    An importance that only scores has chosen all units on the dense model before the first group
    is cut, unless it is to `rescore`. One that chooses from the moments of a layer's inputs, or
    rescores, chooses group by group; how many units each group loses is settled before: by the
    shares of the policy, or, where groups compete, by scores on the dense model.

    Args:
        rescore: an importance that only scores does so for each group on the model as it is once
            the groups before it are cut.
    """

    layerwise: ClassVar[bool] = True
    rescore: bool = False

    def check(self, importance: Importance, rounds: int, independent: bool) -> None:
        """Refuse what needs scores of all layers at once, where units are chosen group by group."""
        if self.rescore and importance.at_once and not importance.at_once.rescores:
            raise ConfigError(
                f"schedule.rescore: expected an importance that scores one group at a time, got "
                f"importance={importance.name}"
            )
        if self._by_group(importance) and (rounds > 1 or independent):
            option = "groups=independent" if independent else f"scope.rounds={rounds}"
            raise ConfigError(
                f"{option}: importance={importance.name} chooses layer by layer; use "
                "schedule=oneshot"
            )

    def _by_group(self, importance: Importance) -> bool:
        """Whether the units of a group are chosen once the groups before it are cut."""
        return self.rescore or importance.by_layer is not None

    def run(self, assignment: Assignment) -> PruningPlan:
        """Choose and repair group by group."""
        if self._by_group(assignment.importance):
            counts = assignment.remember("counts", lambda: count_units(assignment))
            removed = cut_groups(assignment, self.damping, counts=counts)
        else:
            importance = assignment.importance.at_once
            assert importance is not None
            chosen = choose_by_score(assignment, importance)
            removed = cut_groups(assignment, self.damping, chosen=chosen)
        return PruningPlan(removed, assignment.graph.fingerprint)


def count_units(assignment: Assignment) -> dict[str, int]:
    """How many units each group loses, by group name, before any of them is chosen.

    Raises:
        ConfigError: groups that compete under an importance that gives no scores.
    """
    if assignment.budget.ranking == "local":
        return assignment.budget.solve()
    importance = assignment.importance.at_once
    if importance is None:
        raise ConfigError(
            f"scope.ranking={assignment.budget.ranking}: expected an importance that scores units, "
            f"by which groups compete, got importance={assignment.importance.name}"
        )
    scores = importance.score(
        assignment.model, assignment.graph, assignment.groups, assignment.batches
    )
    return assignment.budget.solve(scores)
