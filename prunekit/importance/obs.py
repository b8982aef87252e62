"""Optimal Brain Surgeon: the error that is left after the best repair (SlimGPT, section 4.2).

For a consumer W [d, n] whose inputs have the Hessian H = E[x xᵀ], and A = (H + λI)⁻¹, removing the
columns S costs E(S) = tr(W_S (A_SS)⁻¹ W_Sᵀ) once the other columns are repaired.

Where groups compete, a unit may count by what it adds to the error of its group: units go in the
order in which they are chosen, S_1 ⊂ S_2 ⊂ …, and the k-th scores E(S_k) − E(S_{k−1}), over the
energy E‖W x‖² of the group's outputs (relative), or by the Fisher information of the outputs as it
is, an estimate of what the loss rises by (loss).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from prunekit.calibration.observe import Site
from prunekit.calibration.statistics import invert_moments, pose_problem, scale_of_loss
from prunekit.calibration.walk import Walk
from prunekit.calibration.weighting import Outputs, Tokens, Weighting
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError, expect_one_of
from prunekit.graph import CouplingGraph, Group
from prunekit.importance.base import LayerImportance, ScoreImportance, Sight
from prunekit.obs.choose import Groups, choose_columns, choose_units
from prunekit.obs.inverse import HeadScore, Problem, added_errors, unit_errors
from prunekit.obs.swap import swap

Refine = Literal["none", "swap"]
Compete = Literal["alone", "relative", "loss"]


@dataclass(frozen=True, kw_only=True)
class Obs(ScoreImportance, LayerImportance):
    """Units by E(S): chosen one after another layer by layer, or ranked at once.

    Layer by layer each choice takes the repair of those before it into account. At once, or where
    groups compete, units rank by their errors in the dense model.

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
        compete: what units rank by at once, or where groups compete: the error that each leaves
            alone (alone); or what each adds to the error of those that go before it, over the
            energy of the group's outputs (relative) or as the loss is expected to rise (loss).
    """

    heads: HeadScore = "exact"
    columns: Groups = "greedy"
    refine: Refine = "none"
    damping: float = 0.0001
    tokens: Tokens = "equal"
    clip_quantile: float = 0.99
    first_tokens: int = 1
    outputs: Outputs = "equal"
    compete: Compete = "alone"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_one_of("importance.heads", self.heads, get_args(HeadScore))
        expect_one_of("importance.columns", self.columns, get_args(Groups))
        expect_one_of("importance.refine", self.refine, get_args(Refine))
        if isinstance(self.damping, str) or not 0 <= self.damping < math.inf:
            raise ConfigError(f"importance.damping: expected a number ≥ 0, got {self.damping}")
        self.weighting.check("importance")
        expect_one_of("importance.outputs", self.outputs, get_args(Outputs))
        expect_one_of("importance.compete", self.compete, get_args(Compete))
        if self.compete == "loss" and self.outputs == "equal":
            raise ConfigError(
                "importance.compete=loss: expected importance.outputs=diagonal or full, whose "
                "gradients tell how the loss rises, got equal"
            )

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

    def rescore(self, sight: Sight) -> Tensor:
        """E(S) of each unit alone, on the inputs as they are now."""
        return unit_errors(sight.problems, self.heads).cpu()

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """The error of each unit in the dense model, by `compete`; a row for each site."""
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
            if self.compete == "alone":
                scores[group.name] = self._errors_alone(sites).cpu()
            else:
                scores[group.name] = self._errors_in_turn(sites)[None].cpu()
        return scores

    def _errors_alone(self, sites: Sequence[Site]) -> Tensor:
        """E(S) of each unit alone [sites, units]."""
        errors = []
        for site in sites:
            inverse = invert_moments(site.moments, self.damping)
            problem = pose_problem(site, site.weight(), inverse)
            errors.append(unit_errors([problem], self.heads))
            del inverse, problem  # the next site's inverse takes their room
        return torch.stack(errors)

    def _errors_in_turn(self, sites: Sequence[Site]) -> Tensor:
        """What each unit adds to the error of its group [units], in the unit of `compete`."""
        problems = [
            pose_problem(site, site.weight(), invert_moments(site.moments, self.damping))
            for site in sites
        ]
        units = self.choose(problems, len(problems[0].index))
        added = [added_errors(problem, units) for problem in problems]
        if self.compete == "loss":
            added = [own * scale_of_loss(site) for own, site in zip(added, sites, strict=True)]
            unit = 1.0
        else:
            pairs = zip(problems, sites, strict=True)
            unit = sum(float(site.energy(problem.weight)) for problem, site in pairs)
        total = torch.stack(added).sum(0) / max(unit, 1e-300)
        return torch.empty_like(total).index_copy_(
            0, torch.tensor(units, device=total.device), total
        )
