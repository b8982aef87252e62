"""Wanda (Sun et al. 2023, arXiv 2306.11695) over whole units: weights by the norm of what they are
multiplied with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from prunekit.calibration.activations import input_statistics
from prunekit.calibration.gradients.taps import is_transposed
from prunekit.data.batches import Batch
from prunekit.graph import CouplingGraph, Group, Member
from prunekit.importance.base import ScoreImportance
from prunekit.importance.structures import by_structure
from prunekit.runtime.numbers import along, at_least_float32


@dataclass(frozen=True, kw_only=True)
class Wanda(ScoreImportance):
    """Σ |w_ij| ‖x_j‖₂ over a unit's part of linear modules' weights; other parameters don't count."""

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One forward pass over the calibration set; padding does not count."""
        names = {m.parameter for g in groups for m in g.scored_members(graph)}
        inputs = input_statistics(model, names, batches)

        def positions(member: Member) -> Tensor | None:
            if member.parameter not in inputs:
                return None
            return along(
                products(model, member.parameter, inputs[member.parameter].norm()), member.dim
            )

        return {group.name: by_structure(graph, group, positions) for group in groups}


def products(model: nn.Module, name: str, norm: Tensor) -> Tensor:
    """|w| ‖x‖ elementwise, of the weight's shape, given ‖x‖ [in]."""
    weight = at_least_float32(model.get_parameter(name).detach())
    norm = norm.to(weight)
    transposed = is_transposed(model.get_submodule(name.rpartition(".")[0]))
    return weight.abs() * (norm[:, None] if transposed else norm)
