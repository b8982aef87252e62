"""REAP (Lasby et al. 2025, arXiv 2510.13999): how much an expert adds to the tokens sent to it.

S_e = mean over the tokens t that the router sends to expert e of g_e(t) · ‖f_e(x_t)‖₂, with its
gate g and its output f. The mean makes no difference between experts that are chosen often and
seldom: what counts is what is lost where an expert was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from prunekit.calibration.experts import gather_expert_sums
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group, Member
from prunekit.importance.base import ScoreImportance
from prunekit.runtime.console import say


@dataclass(frozen=True, kw_only=True)
class Reap(ScoreImportance):
    """The mean norm of an expert's gated output, over the tokens that are sent to the expert."""

    def expect_groups(self, graph: CouplingGraph, groups: Sequence[Group]) -> None:
        """Check that all are experts whose matrices are stacked."""
        for group in groups:
            _stacked_member(graph, group)

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One structure a group, from one forward pass that computes experts twice."""
        stacked = {group.name: _stacked_member(graph, group) for group in groups}
        paths = {name: member.parameter.rpartition(".")[0] for name, member in stacked.items()}
        experts = {
            paths[name]: graph.shapes[member.parameter][0] for name, member in stacked.items()
        }
        sums = gather_expert_sums(model, experts, batches)
        scores = {}
        for name, member in stacked.items():
            own = sums[paths[name]]
            scores[name] = own.means()[member.index].sum(1)[None]
            if idle := int((own.tokens[: own.experts] == 0).sum()):
                say(f"{name}: no token was sent to {idle} of {own.experts} experts, which score 0")
        return scores


def _stacked_member(graph: CouplingGraph, group: Group) -> Member:
    """The member of a group of experts that stacks their matrices [experts, rows, columns].

    Raises:
        ConfigError: the group is none of experts, or they are not stacked.
    """
    if group.kind != "expert":
        raise ConfigError(f"importance=reap scores experts (groups=expert), not {group.name}")
    for member in group.members:
        if member.dim == 0 and len(graph.shapes[member.parameter]) == 3:
            return member
    raise ConfigError(f"importance=reap: {group.name}: expected experts stacked in one parameter")
