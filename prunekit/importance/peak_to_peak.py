"""Peak to peak, as optipfair 0.4.2 scores the channels of gated FFNs on data.

I_u = ‖x_u‖₂ Σ_i p_iu / max_v p_iv over the matrices i of the group, with the range
p_iu = max W_iu − min W_iu of unit u's slice (a row of gate and up, a column of down) and its
activations x_u over all calibration tokens. Crude, and on some models better than least squares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.calibration.activations import InputSums, gather_input_statistics
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group, Member
from prunekit.importance.base import ScoreImportance, Sight
from prunekit.runtime.numbers import at_least_float32


@dataclass(frozen=True, kw_only=True)
class PeakToPeak(ScoreImportance):
    """The range of a unit's weights in each matrix, times the norm of its activations."""

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One row a group; one forward pass over the calibration set, padding does not count."""
        names = {member.parameter for group in groups for member in group.consumers}
        inputs = gather_input_statistics(model, names, batches)
        return {group.name: _score(model, graph, group, inputs)[None] for group in groups}

    def rescore(self, sight: Sight) -> Tensor:
        """By the inputs of the consumers as they are now; without another pass."""
        scores = _score(sight.model, sight.graph, sight.group, sight.inputs)
        return self.combine(sight.group, scores[None])


def _score(
    model: nn.Module, graph: CouplingGraph, group: Group, inputs: Mapping[str, InputSums]
) -> Tensor:
    """The scores of a group's units [num_units], given the inputs of its consumers."""
    squares = torch.zeros(group.num_units, dtype=torch.float64)
    for member in group.consumers:
        if member.parameter in inputs and not member.apart:
            norm = inputs[member.parameter].norm().double().cpu()
            squares += norm[member.index].square().sum(1)
    if not squares.any():
        raise ConfigError(
            f"{group.name}: peak_to_peak takes the inputs of linear modules, none reads it"
        )
    ranges = [
        measure_ranges(model.get_parameter(member.parameter), member)
        for member in group.scored_members(graph)
        if model.get_parameter(member.parameter).ndim > 1
    ]
    shares = [own / own.max().clamp_min(1e-300) for own in ranges]
    return torch.stack(shares).sum(0) * squares.sqrt()


def measure_ranges(parameter: Tensor, member: Member) -> Tensor:
    """The largest less the smallest weight of each unit's slice, float64 [num_units]."""
    rows = at_least_float32(parameter.detach()).movedim(member.dim, 0).flatten(1)
    index = member.index.to(rows.device)
    highest, lowest = rows.amax(1)[index].amax(1), rows.amin(1)[index].amin(1)
    return (highest - lowest).double().cpu()
