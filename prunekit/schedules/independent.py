"""Independent units, the ablation of LLM-Pruner's table 6: every matrix loses its own worst units.

Every structure of a group keeps as many units as the plan of the group says, but chooses them by
itself, whatever depends on them elsewhere. Its slices are moved to where the plan keeps units, so
that an ordinary cut can follow: shapes fit, what the units mean does not.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from prunekit.errors import ConfigError
from prunekit.graph import CouplingGraph, Member
from prunekit.graph.groups import kept_positions


def scatter(
    model: nn.Module,
    graph: CouplingGraph,
    structures: Mapping[str, Tensor],
    removed: Mapping[str, list[int]],
) -> None:
    """Move the slices of every structure in place, by its own scores.

    Args:
        model: changed in place.
        graph: its coupling graph.
        structures: group name → scores [structures, num_units].
        removed: group name → the units that the plan removes.

    Raises:
        ConfigError: an importance that doesn't score every structure of a group.
    """
    for name, units in removed.items():
        matrices = graph[name].structures(graph)
        if len(matrices) != len(structures[name]):
            raise ConfigError(
                "groups=independent: expected an importance that scores each of the "
                f"{len(matrices)} matrices of {name}, this one scores {len(structures[name])}"
            )
        places = kept_positions(len(structures[name][0]), units)
        for scores, parts in zip(structures[name], matrices, strict=True):
            worst = scores.argsort(stable=True)[: len(units)]
            own = kept_positions(len(scores), worst.tolist())
            for part in parts:
                move_slices(model.get_parameter(part.member.parameter), part.member, own, places)


def move_slices(parameter: Tensor, member: Member, units: Tensor, places: Tensor) -> None:
    """Copy the slices of `units` [kept] to those of the units `places` [kept], in place."""
    index = member.index.to(parameter.device)
    source = parameter.detach().index_select(member.dim, index[units].flatten())
    parameter.data.index_copy_(member.dim, index[places].flatten(), source)
