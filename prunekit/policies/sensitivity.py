"""Measured: what it costs to cut each layer alone, then the shares that cost the least in all at
the target.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch

from prunekit.calibration.gradients.loss import calibration_loss
from prunekit.calibration.statistics import invert_moments, pose_problem
from prunekit.calibration.walk import Walk
from prunekit.errors import ConfigError, suggest
from prunekit.graph import Group
from prunekit.importance.base import LayerImportance, ScoreImportance
from prunekit.obs.inverse import removal_error
from prunekit.policies.base import Policy, Setting
from prunekit.runtime.console import track
from prunekit.runtime.modes import undisturbed
from prunekit.surgery.masking import masked

Measure = Literal["loss", "obs"]
Curve = list[
    tuple[float, float, float]
]  # (ratio, cost saved, error), by rising ratio, from (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Policy):
    """Cut each layer alone at a few `ratios` of its units; then spread the target so that the
    errors' sum is least.

    `measure`: what the calibration loss rises by with the least important units masked (loss), or
    the error that Optimal Brain Surgeon leaves in the consumers, relative to their outputs (obs).
    `by`: layer or group.
    """

    measures: ClassVar[bool] = True
    ratios: Sequence[float] = (0.1, 0.25, 0.5, 0.75)
    measure: Measure = "loss"
    by: Literal["layer", "group"] = "layer"

    def __post_init__(self) -> None:
        for key, value, known in (
            ("measure", self.measure, get_args(Measure)),
            ("by", self.by, ("layer", "group")),
        ):
            if value not in known:
                raise ConfigError(
                    f"policy.{key}: unknown {value!r}: {suggest(str(value), list(known))}"
                )
        if not self.ratios or not all(
            isinstance(r, int | float) and 0 < r < 1 for r in self.ratios
        ):
            raise ConfigError(f"policy.ratios: expected numbers in (0, 1), got {list(self.ratios)}")

    def group_shares(self, setting: Setting) -> dict[str, float]:
        """A knapsack over the lower convex hulls of the measured curves, linear in between: its
        exact optimum.
        """
        parts: dict[str, list[Group]] = defaultdict(list)
        for group in setting.groups:
            whole = self.by == "layer" and group.layer is not None
            parts[f"layer {group.layer}" if whole else group.name].append(group)
        counts = {key: self._counts(groups) for key, groups in parts.items()}
        by = self._by_loss if self.measure == "loss" else self._by_obs
        errors = by(setting, parts, counts)
        setting.notes["sensitivity"] = {
            "ratios": sorted(self.ratios),
            "measure": self.measure,
            "errors": errors,
        }
        dense = setting.cost({})
        curves = {}
        for key, groups in parts.items():
            saved = [dense - setting.cost(removed) for removed in counts[key]]
            units = [g.num_units for g in groups]
            ratios = [sum(removed.values()) / sum(units) for removed in counts[key]]
            curves[key] = [(0.0, 0.0, 0.0), *zip(ratios, saved, errors[key], strict=True)]
        best = knapsack(curves, dense - setting.limit)
        return {
            group.name: max(best[key], 1e-6) for key, groups in parts.items() for group in groups
        }

    def _counts(self, groups: Sequence[Group]) -> list[dict[str, int]]:
        """For each ratio, by rising ones, whole units of each group; one at least stays."""
        return [
            {g.name: min(round(r * g.num_units), g.num_units - 1) for g in groups}
            for r in sorted(self.ratios)
        ]

    def _by_loss(
        self,
        setting: Setting,
        parts: Mapping[str, list[Group]],
        counts: Mapping[str, list[dict[str, int]]],
    ) -> dict[str, list[float]]:
        if not isinstance(setting.importance, ScoreImportance):
            raise ConfigError(
                "policy=sensitivity: expected an importance that scores, or policy.measure=obs"
            )
        model, batches = setting.model, setting.batches
        scores = setting.importance.score(model, setting.graph, setting.groups, batches)
        order = {name: values.argsort(stable=True).tolist() for name, values in scores.items()}
        found: dict[str, list[float]] = defaultdict(list)
        with undisturbed(model), torch.no_grad():
            dense = calibration_loss(model, batches)
            for key in track(parts, "sensitivity", len(parts)):
                for gone in counts[key]:
                    removed = {name: order[name][:count] for name, count in gone.items()}
                    with masked(model, setting.graph, removed):
                        found[key].append(calibration_loss(model, batches) - dense)
        return dict(found)

    def _by_obs(
        self,
        setting: Setting,
        parts: Mapping[str, list[Group]],
        counts: Mapping[str, list[dict[str, int]]],
    ) -> dict[str, list[float]]:
        if not isinstance(setting.importance, LayerImportance):
            raise ConfigError(
                "policy.measure=obs: expected importance=obs, which chooses by that error"
            )
        places = {group.name: key for key, groups in parts.items() for group in groups}
        found = {key: [0.0] * len(self.ratios) for key in parts}
        for group, sites in Walk(
            model=setting.model, groups=setting.groups, batches=setting.batches
        ):
            problems = [
                pose_problem(site, site.weight(), invert_moments(site.moments, 0.0001))
                for site in sites
            ]
            energy = sum(site.energy() for site in sites)
            for i, removed in enumerate(counts[places[group.name]]):
                chosen = setting.importance.choose(problems, removed[group.name])
                error = sum(removal_error(problem, chosen).item() for problem in problems)
                found[places[group.name]][i] += error / max(energy, 1e-300)
        return found


def knapsack(curves: Mapping[str, Curve], target: float) -> dict[str, float]:
    """Ratio of each curve such that the savings add up to `target` (or all there is) and the errors
    to the least.

    The curves become their lower convex hulls; then the segments with the least error per saving
    are taken in order, the last one in part: optimal for piecewise linear convex curves.
    """
    segments = []
    for key, curve in curves.items():
        for (_, s0, e0), (r1, s1, e1) in pairwise(_hull(curve)):
            segments.append(((e1 - e0) / max(s1 - s0, 1e-300), key, s1 - s0, r1))
    ratios, left = dict.fromkeys(curves, 0.0), target
    for _, key, saving, end in sorted(segments, key=lambda segment: segment[0]):
        part = min(max(left / saving, 0.0), 1.0) if saving > 0 else 0.0
        ratios[key] += part * (end - ratios[key])
        left -= part * saving
    return ratios


def _hull(curve: Curve) -> Curve:
    """The lower convex hull over the savings."""
    hull: Curve = []
    for point in curve:
        if hull and point[1] <= hull[-1][1]:
            continue  # rounded to the units of the point before
        while len(hull) > 1 and (hull[-1][2] - hull[-2][2]) * (point[1] - hull[-2][1]) >= (
            point[2] - hull[-2][2]
        ) * (hull[-1][1] - hull[-2][1]):
            hull.pop()
        hull.append(point)
    return hull
