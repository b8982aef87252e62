"""Solve for whole units: scale a policy's shares until the parameters removed hit the target.

`ratio` is the share of all the model's parameters. The number of parameters that stay is multilinear in the units
removed (a matrix cut on both sides loses a product), so the scale is found by bisection on the exact count; then units
are rounded kind by kind, the dearest first, and each kind makes up for what the rounding of the ones before it left.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from prunekit.errors import ConfigError
from prunekit.graph import CoupledGroup, CouplingGraph
from prunekit.policies.base import Policy

Counts = dict[str, float]


def depth_shares(groups: Sequence[CoupledGroup], policy: Policy) -> dict[str, float]:
    """Group name → relative share: by layer where every group lies in one, else by execution order."""
    layers = sorted({group.layer for group in groups if group.layer is not None})
    if layers and all(group.layer is not None for group in groups):
        shares = policy.shares(layers[-1] + 1)
        return {group.name: shares[group.layer] for group in groups if group.layer is not None}
    shares = policy.shares(len(groups))
    return {group.name: share for group, share in zip(groups, shares, strict=True)}


def allocate(graph: CouplingGraph, groups: Sequence[CoupledGroup], policy: Policy, ratio: float) -> dict[str, int]:
    """Units to remove from each group so that `ratio` of all the model's parameters goes.

    Hits the target within half a unit of the cheapest group wherever that group has units to spare. At least one unit
    of every group stays.

    Raises:
        ConfigError: `ratio` outside (0, 1), or beyond what the policy can remove (the message says the nearest).
    """
    if not 0 < ratio < 1:
        raise ConfigError(f"ratio: expected a number in (0, 1), got {ratio}")
    if not groups:
        raise ConfigError("no group to prune: the model has none of the kinds asked for")
    solver = _Solver(graph, groups, depth_shares(groups, policy))
    total = graph.num_parameters()
    target, reach = ratio * total, solver.removed(solver.caps)
    cheapest = min(group.parameters_per_unit for group in groups)
    if target > reach + cheapest / 2:
        raise ConfigError(
            f"ratio: {ratio:g} of {total:,} parameters is out of reach: this policy can remove at most "
            f"{math.floor(reach / total * 10_000) / 10_000:g} of them (one unit of every group stays)"
        )
    return solver.solve(target)


class _Solver:
    def __init__(self, graph: CouplingGraph, groups: Sequence[CoupledGroup], shares: Mapping[str, float]) -> None:
        self.groups = list(groups)
        self.weights = {g.name: shares[g.name] * g.num_units for g in groups}
        self.caps: Counts = {g.name: g.num_units - 1.0 if shares[g.name] > 0 else 0.0 for g in groups}
        self.tensors: dict[str, tuple[tuple[int, ...], list[tuple[str, int, int]]]] = {}
        for group in groups:
            for member in group.members:
                if member.parameter not in graph.buffers:
                    _, cuts = self.tensors.setdefault(member.parameter, (graph.shapes[member.parameter], []))
                    cuts.append((group.name, member.dim, member.index.shape[1]))

    def removed(self, counts: Mapping[str, float]) -> float:
        """Parameters removed by these (fractional) counts of units."""
        gone = 0.0
        for shape, cuts in self.tensors.values():
            kept = [float(size) for size in shape]
            for name, dim, width in cuts:
                kept[dim] -= width * counts[name]
            gone += math.prod(shape) - math.prod(kept)
        return gone

    def scaled(self, scale: float, fixed: Mapping[str, int]) -> Counts:
        """Counts at a scale of the shares, under the caps; groups in `fixed` keep theirs."""
        return {n: fixed.get(n, min(scale * w, self.caps[n])) for n, w in self.weights.items()}

    def continuous(self, target: float, fixed: Mapping[str, int]) -> Counts:
        """Fractional counts that remove exactly the target (or come as near as the caps allow)."""
        low, high = 0.0, 1.0
        while self.removed(self.scaled(high, fixed)) < target and high < 1e12:
            high *= 2
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self.removed(self.scaled(middle, fixed)) < target else (low, middle)
        return self.scaled(high, fixed)

    def solve(self, target: float) -> dict[str, int]:
        classes: dict[int, list[CoupledGroup]] = defaultdict(list)
        for group in self.groups:
            classes[group.parameters_per_unit].append(group)
        fixed: dict[str, int] = {}
        for cost in sorted(classes, reverse=True):
            counts = self.continuous(target, fixed)
            fixed |= self._round({g.name: counts[g.name] for g in classes[cost]})
        return self._polish(fixed, target, [g.name for g in classes[min(classes)]])

    def _round(self, counts: Counts) -> dict[str, int]:
        """Whole numbers with the same total (to the nearest one), by largest remainder."""
        whole = {name: math.floor(count + 1e-9) for name, count in counts.items()}
        missing = math.floor(sum(counts.values()) + 0.5) - sum(whole.values())
        open_ = [name for name in counts if whole[name] < self.caps[name]]
        for name in sorted(open_, key=lambda n: whole[n] - counts[n])[: max(missing, 0)]:
            whole[name] += 1
        return whole

    def _polish(self, counts: dict[str, int], target: float, names: list[str]) -> dict[str, int]:
        """Move single units of the cheapest groups while that comes nearer to the target."""
        error = abs(self.removed(counts) - target)
        improved = True
        while improved:
            improved = False
            for name in sorted(names, key=lambda n: -self.weights[n]):
                for step in (1, -1):
                    trial = {**counts, name: counts[name] + step}
                    if 0 <= trial[name] <= self.caps[name] and abs(self.removed(trial) - target) < error - 1e-9:
                        counts, error, improved = trial, abs(self.removed(trial) - target), True
        return counts
