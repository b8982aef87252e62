"""Fluctuation (FLAP, An et al. 2023, arXiv 2312.11983): inputs that hardly vary can be constants.

I_u = Σ_{j ∈ u} Var(x_j) ‖W_:j‖² (its metric WIFV): what replacing the inputs of a unit by
their means changes in what reads them. `compensation=bias` puts these means into the biases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from prunekit.calibration.activations import InputSums, gather_input_statistics
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Group, Member
from prunekit.importance.aggregation import Normalisation
from prunekit.importance.base import ScoreImportance, Sight
from prunekit.importance.structures import sum_by_structure
from prunekit.runtime.numbers import along, at_least_float32


@dataclass(frozen=True, kw_only=True)
class Fluctuation(ScoreImportance):
    """Var(x_j) ‖W_:j‖² over the columns that a unit owns in the linear modules that read it.

    Where groups compete, scores over the mean of their group do, by default.
    """

    normalisation: Normalisation = "mean"

    def structures(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        groups: Sequence[Group],
        batches: Sequence[Batch],
    ) -> dict[str, Tensor]:
        """One forward pass over the calibration set; padding does not count."""
        names = {member.parameter for group in groups for member in group.consumers}
        inputs = gather_input_statistics(model, names, batches)
        return {group.name: self._score(model, graph, group, inputs) for group in groups}

    def rescore(self, sight: Sight) -> Tensor:
        """By the inputs of the consumers as they are now; without another pass."""
        scores = self._score(sight.model, sight.graph, sight.group, sight.inputs)
        return self.combine(sight.group, scores)

    def _score(
        self,
        model: nn.Module,
        graph: CouplingGraph,
        group: Group,
        inputs: Mapping[str, InputSums],
    ) -> Tensor:
        """The structures of a group [structures, num_units], given the inputs of its consumers."""
        known = [m for m in group.consumers if m.parameter in inputs and not m.apart]
        if not known:
            raise ConfigError(
                f"{group.name}: fluctuation scores what linear modules read, and none reads it"
            )

        def positions(member: Member) -> Tensor | None:
            if member not in known:
                return None
            weight = at_least_float32(model.get_parameter(member.parameter).detach())
            return along(weight.square(), member.dim) * inputs[member.parameter].variance()

        return sum_by_structure(graph, group, positions)
