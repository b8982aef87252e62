"""Measured shares: the error of cutting each part alone, then the least error at the limit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from prunekit.calibration.gradients.loss import calibration_loss
from prunekit.calibration.statistics import invert_moments, pose_problem
from prunekit.calibration.walk import Walk
from prunekit.errors import ConfigError, expect_one_of
from prunekit.graph import Group
from prunekit.importance import Obs
from prunekit.obs.inverse import removal_error
from prunekit.policies.base import Policy, Setting, is_number
from prunekit.policies.knapsack import Point, spread_saving
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed
from prunekit.surgery.masking import masked

Measure = Literal["loss", "obs"]
By = Literal["layer", "group"]
Counts = Mapping[str, Sequence[Mapping[str, int]]]  # part → for each ratio: group → units removed

_DAMPING = 0.0001  # λ / mean(diag H) of the errors that measure=obs compares
_LEAST = 1e-6  # a share of zero would leave the group out of the cut


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Policy):
    """Cut each part alone at a few ratios; then spread the cut so that the errors' sum is least.

    Args:
        ratios: shares of a part's units, in (0, 1), that it is tried at.
        measure: the error: what the calibration loss rises by with the least important units masked
            (loss); or what Optimal Brain Surgeon leaves in the consumers, relative to their outputs
            (obs), whatever will choose the units.
        by: what is cut alone: all groups of a layer, or each group.
    """

    measures: ClassVar[bool] = True
    ratios: Sequence[float] = (0.1, 0.25, 0.5, 0.75)
    measure: Measure = "loss"
    by: By = "layer"

    def __post_init__(self) -> None:
        expect_one_of("policy.measure", self.measure, get_args(Measure))
        expect_one_of("policy.by", self.by, get_args(By))
        ratios = self.ratios
        listed = isinstance(ratios, Sequence) and len(ratios) > 0
        if not listed or not all(is_number(ratio) and 0 < ratio < 1 for ratio in ratios):
            raise ConfigError(
                f"policy.ratios: expected a list of numbers in (0, 1), got {self.ratios!r}"
            )

    def group_shares(self, setting: Setting) -> dict[str, float]:
        """The exact optimum, if errors add up and are linear between the measured ratios.

        Raises:
            ConfigError: an importance that can't choose what the measure needs.
        """
        parts = self._split(setting.groups)
        counts = {key: self._count_units(groups) for key, groups in parts.items()}
        errors = (
            _measure_losses(setting, counts)
            if self.measure == "loss"
            else _measure_obs_errors(setting, counts)
        )
        setting.notes["sensitivity"] = {
            "ratios": sorted(self.ratios),
            "measure": self.measure,
            "errors": errors,
        }
        dense = setting.cost({})
        curves = {}
        for key, groups in parts.items():
            units = sum(group.num_units for group in groups)
            curves[key] = [Point(0.0, 0.0, 0.0)]
            for removed, error in zip(counts[key], errors[key], strict=True):
                saving = dense - setting.cost(removed)
                curves[key].append(Point(sum(removed.values()) / units, saving, error))
        best = spread_saving(curves, dense - setting.limit)
        return {
            group.name: max(best[key], _LEAST) for key, groups in parts.items() for group in groups
        }

    def _split(self, groups: Sequence[Group]) -> dict[str, list[Group]]:
        """The parts that are cut alone, by name."""
        parts: dict[str, list[Group]] = defaultdict(list)
        for group in groups:
            whole = self.by == "layer" and group.layer is not None
            parts[f"layer {group.layer}" if whole else group.name].append(group)
        return dict(parts)

    def _count_units(self, groups: Sequence[Group]) -> list[dict[str, int]]:
        """For each ratio in rising order: group → whole units; at least one unit stays."""
        return [
            {g.name: min(round(ratio * g.num_units), g.num_units - 1) for g in groups}
            for ratio in sorted(self.ratios)
        ]


def _measure_losses(setting: Setting, counts: Counts) -> dict[str, list[float]]:
    """Part → for each ratio, the rise of the loss with the lowest units of the part masked."""
    importance = setting.importance.at_once
    if importance is None:
        raise ConfigError(
            "policy=sensitivity: expected an importance that scores units, or policy.measure=obs, "
            f"got importance={setting.importance.name}"
        )
    model, batches = setting.model, setting.batches
    scores = importance.score(model, setting.graph, setting.groups, batches)
    order = {name: values.argsort(stable=True).tolist() for name, values in scores.items()}
    rises: dict[str, list[float]] = defaultdict(list)
    with undisturbed(model), torch.no_grad():
        dense = calibration_loss(model, batches)
        for key in track(counts, "sensitivity", len(counts)):
            for removed in counts[key]:
                units = {name: order[name][:count] for name, count in removed.items()}
                with masked(model, setting.graph, units):
                    rises[key].append(calibration_loss(model, batches) - dense)
    return dict(rises)


def _measure_obs_errors(setting: Setting, counts: Counts) -> dict[str, list[float]]:
    """Part → for each ratio Σ over its groups of the error left after repair over E‖W x‖²."""
    chooser = setting.importance
    importance = chooser.by_layer or Obs(outputs=chooser.output_weights)
    parts = {name: key for key, tried in counts.items() for name in tried[0]}
    errors = {key: [0.0] * len(tried) for key, tried in counts.items()}
    walk = Walk(
        model=setting.model,
        groups=setting.groups,
        batches=setting.batches,
        weighting=importance.weighting,
        outputs=importance.output_weights,
    )
    for group, sites in walk:
        problems = [
            pose_problem(site, site.weight(), invert_moments(site.moments, _DAMPING))
            for site in sites
        ]
        energy = sum(site.energy() for site in sites)
        key = parts[group.name]
        levels = [removed[group.name] for removed in counts[key]]
        for i, units in enumerate(importance.choose_levels(problems, levels)):
            error = sum(removal_error(problem, units).item() for problem in problems)
            errors[key][i] += error / max(energy, 1e-300)
    return errors
