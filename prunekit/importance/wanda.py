"""Wanda over whole units (Sun et al. 2023, arXiv 2306.11695): I_u = Σ_{ij ∈ u} |w_ij| ‖x_j‖₂.

‖x_j‖₂ is the norm of input feature j over all tokens of the calibration set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from prunekit.calibration.activations import InputSums, gather_input_statistics
from prunekit.data.batches import Batch
from prunekit.graph import CouplingGraph, Group, Member
from prunekit.importance.aggregation import Aggregation
from prunekit.importance.base import ScoreImportance, Sight
from prunekit.importance.structures import scale_by_inputs, sum_by_structure
from prunekit.runtime.numbers import along


@dataclass(frozen=True, kw_only=True)
class Wanda(ScoreImportance):
    """Weights of linear modules by the norm of what they are multiplied with.

    Other parameters do not count. By default neither do the structures before the last one, which
    reads the units (`o_proj`, `down_proj`): so Wanda-sp of FLAP's authors scores units.
    """

    aggregation: Aggregation = "last"

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One forward pass over the calibration set; padding does not count."""
        names = {m.parameter for g in groups for m in g.scored_members(graph)}
        inputs = gather_input_statistics(model, names, batches)

        return {group.name: _score(model, graph, group, inputs) for group in groups}

    def rescore(self, sight: Sight) -> Tensor:
        """By the inputs of the consumers as they are now, where no other structure counts."""
        if self.aggregation != "last":
            return super().rescore(sight)
        scores = _score(sight.model, sight.graph, sight.group, sight.inputs)
        return self.combine(sight.group, scores)


def _score(
    model: nn.Module, graph: CouplingGraph, group: Group, inputs: Mapping[str, InputSums]
) -> Tensor:
    """The structures of a group [structures, num_units], of matrices whose inputs are known."""

    def positions(member: Member) -> Tensor | None:
        if member.parameter not in inputs or member.apart:
            return None
        norm = inputs[member.parameter].norm()
        return along(scale_by_inputs(model, member.parameter, norm), member.dim)

    return sum_by_structure(graph, group, positions)
