"""Optimal Brain Surgeon: the error that is left after the best repair (SlimGPT, section 4.2).

For a consumer W [d, n] whose inputs have the Hessian H = E[x xᵀ], and A = (H + λI)⁻¹, removing the
columns S costs E(S) = tr(W_S (A_SS)⁻¹ W_Sᵀ) once the other columns are repaired.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prunekit.calibration.statistics import invert_moments, pose_problem
from prunekit.calibration.walk import Walk
from prunekit.calibration.weighting import Outputs, Tokens, Weighting
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError, expect_one_of
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import LayerImportance, ScoreImportance
from prunekit.obs.choose import Groups, choose_columns, choose_units
from prunekit.obs.inverse import HeadScore, Problem, unit_errors
from prunekit.obs.swap import swap

Refine = Literal["none", "swap"]


@dataclass(frozen=True, kw_only=True)
class Obs(ScoreImportance, LayerImportance):
    """Units by E(S): chosen one after another layer by layer, or ranked at once.

    Layer by layer each choice takes the repair of those before it into account. At once, or where
    groups compete, units rank by the error that each of them leaves alone in the dense model.

    Args:
        heads: how units of several columns are scored: exact (E(S)), grouped_cholesky (the paper's
            Σ_j ‖w_j‖² / L_jj², A = L Lᵀ) or diagonal (Σ_j ‖w_j‖² / A_jj, the paper's ablation).
        columns: how single columns are taken: greedy (one at a time, exact), or several at once:
            dynamic_group (the paper's), released_group (its code's), fixed_group (of 128).
        refine: swap exchanges removed with kept units afterwards, while the exact error falls.
        damping: λ / mean(diag H) of the ranking at once; layer by layer the schedule's counts.
        tokens: how much each token's error counts: equal, relative, clipped, without_first or
            gradient (`prunekit.calibration.weighting.Weighting`).
        clip_quantile: for clipped, the quantile of the tokens' norms.
        first_tokens: for without_first, how many tokens of each sample are left out.
        outputs: how much errors in each output count: equal; or by the Fisher information of the
            outputs, the squares of the loss's gradients (diagonal) or all their products (full).
    """

    heads: HeadScore = "exact"
    columns: Groups = "greedy"
    refine: Refine = "none"
    damping: float = 0.0001
    tokens: Tokens = "equal"
    clip_quantile: float = 0.99
    first_tokens: int = 1
    outputs: Outputs = "equal"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_one_of("importance.heads", self.heads, get_args(HeadScore))
        expect_one_of("importance.columns", self.columns, get_args(Groups))
        expect_one_of("importance.refine", self.refine, get_args(Refine))
        if isinstance(self.damping, str) or not 0 <= self.damping < math.inf:
            raise ConfigError(f"importance.damping: expected a number ≥ 0, got {self.damping}")
        self.weighting.check("importance")
        expect_one_of("importance.outputs", self.outputs, get_args(Outputs))

    @property
    def weighting(self) -> Weighting:
        """How tokens are weighed in the moments that units are chosen by."""
        return Weighting(
            tokens=self.tokens, clip_quantile=self.clip_quantile, first_tokens=self.first_tokens
        )

    @property
    def output_weights(self) -> Outputs:
        """How errors in the outputs are weighed where units are chosen."""
        return self.outputs

    @property
    def nested(self) -> bool:
        """Heads go one by one, and so do columns that are taken greedily."""
        return self.columns == "greedy" and self.refine == "none"

    def choose(self, problems: Sequence[Problem], count: int) -> list[int]:
        """Choose units one by one by the least error; with `refine`, swap them afterwards."""
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
        """E(S) of each unit alone, on the activations of the dense model; a row for each site."""
        scores = {}
        walk = Walk(
            model=model,
            groups=groups,
            batches=batches,
            around=graph.groups,
            weighting=self.weighting,
            outputs=self.outputs,
        )
        for group, sites in walk:
            errors = []
            for site in sites:
                inverse = invert_moments(site.moments, self.damping)
                problem = pose_problem(site, site.weight(), inverse)
                errors.append(unit_errors([problem], self.heads))
                del inverse, problem  # the next site's inverse takes their room
            scores[group.name] = torch.stack(errors).cpu()
        return scores
