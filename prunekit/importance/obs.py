"""Optimal Brain Surgeon as an importance: the error that is left after the best repair (SlimGPT,
section 4.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prunekit.calibration.statistics import invert_moments, pose_problem
from prunekit.calibration.walk import Walk
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError, suggest
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import LayerImportance, ScoreImportance
from prunekit.obs.choose import Groups, choose_columns, choose_units
from prunekit.obs.inverse import HeadScore, Problem, unit_errors
from prunekit.obs.swap import swap

Refine = Literal["none", "swap"]


@dataclass(frozen=True, kw_only=True)
class Obs(ScoreImportance, LayerImportance):
    """Units of several columns by `heads`: exact, grouped_cholesky or diagonal; single columns by
    `columns`.

    Layer by layer it chooses one unit after another, or single columns in groups (dynamic_group,
    released_group, fixed_group); `refine=swap` then exchanges removed and kept units while the
    exact error falls. At once, or where groups compete, units rank by the error each of them leaves
    alone in the dense model. `damping`: of the Hessians of that ranking, as the schedule's.
    """

    heads: HeadScore = "exact"
    columns: Groups = "greedy"
    refine: Refine = "none"
    damping: float = 0.0001

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, known in (("heads", HeadScore), ("columns", Groups), ("refine", Refine)):
            if (value := getattr(self, key)) not in get_args(known):
                raise ConfigError(
                    f"importance.{key}: unknown {value!r}: {suggest(str(value), list(get_args(known)))}"
                )

    def choose(self, problems: Sequence[Problem], count: int) -> list[int]:
        """The least error after what went before; then exchanged one by one where that is asked
        for.
        """
        if all(problem.index.shape[1] == 1 for problem in problems):
            chosen = choose_columns(problems, count, self.columns)
        else:
            chosen = choose_units(problems, count, self.heads)
        return swap(problems, chosen) if self.refine == "swap" else chosen

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """E(S) of each unit alone on the model's own activations."""
        found = {}
        for group, sites in Walk(model=model, groups=groups, batches=batches):
            errors = []
            for site in sites:
                inverse = invert_moments(site.moments, self.damping)
                problem = pose_problem(site, site.weight(), inverse)
                errors.append(unit_errors([problem], self.heads))
                del inverse, problem  # the next site's inverse takes their room
            found[group.name] = torch.stack(errors).cpu()
        return found
