"""Scores from gradients: g = ∂L/∂W, and the diagonal F_kk = Σ_j g_jk² of the Fisher information.

L is the mean loss over all targets of the calibration set, g_j the gradient of sample j's own mean
loss over its n_j targets, so that g = Σ_j n_j g_j / Σ_j n_j. For a linear module g_j is the product
of its inputs and its output gradients over the positions of sample j: one backward pass gives those
of all samples of a batch. For any other parameter each sample takes a backward pass of its own.
"""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from prunekit.calibration.gradients.passes import FISHER, Elements, GradientPass
from prunekit.calibration.gradients.state import recomputing
from prunekit.calibration.gradients.tapped import TappedLinear, find_tapped
from prunekit.data.batches import Batch, split_samples
from prunekit.graph import CouplingGraph, Group
from prunekit.graph.groups import ParameterDim
from prunekit.runtime.console import say
from prunekit.runtime.modes import undisturbed


def score_positions(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    elements: Elements,
    *,
    moments: Collection[str],
    memory: int | None = None,
    checkpointing: bool = False,
) -> dict[ParameterDim, Tensor]:
    """Score every position along every (parameter, dim) among the members of groups: |Σ_k e_k|.

    The sum runs over the elements k at this position. The model is left as it was, after an error
    too.

    Args:
        model: any module with a loss.
        graph: its coupling graph.
        groups: the groups whose members are scored.
        batches: the calibration set, keyword arguments of forward calls.
        elements: (parameter, moments) → e, of the shape of the parameter.
        moments: the moments that `elements` needs: "mean" is g, "fisher" is F; both have the shape
            of the parameter, and are float32 at least.
        memory: the bytes that accumulated moments may take; parameters beyond that wait for another
            pass over the calibration set. None: all in one pass. The gradients of a single batch
            are reduced one by one, and need no such memory.
        checkpointing: compute layers again in the backward pass instead of keeping activations.

    Returns:
        (parameter, dim) → float64 [size of that dim].

    Raises:
        DataError: the model has no loss, the data no target, or a gradient is not finite.
    """
    places = [(m.parameter, m.dim) for g in groups for m in g.scored_members(graph)]
    dims: dict[str, list[int]] = {name: [] for name, _ in places}
    for name, dim in dict.fromkeys(places):
        dims[name].append(dim)
    scores: dict[ParameterDim, Tensor] = {}
    with undisturbed(model):
        tapped = find_tapped(model, batches, dims) if FISHER in moments else {}
        if FISHER in moments and (others := [name for name in dims if name not in tapped]):
            say(f"Fisher information: sample by sample, for {others[0]} and {len(others) - 1} more")
        with recomputing(model, checkpointing):
            for part in split_parameters(
                model, split_batches(batches, dims, tapped, moments), dims, moments, memory
            ):
                run = GradientPass(
                    model, {name: dims[name] for name in part}, tapped, tuple(moments), elements
                )
                scores |= run.score(split_batches(batches, part, tapped, moments))
    return scores


def split_batches(
    batches: Sequence[Batch],
    names: Collection[str],
    tapped: Mapping[str, TappedLinear],
    moments: Collection[str],
) -> Sequence[Batch]:
    """The batches; or each sample as a batch, for the Fisher information of untapped parameters."""
    if FISHER not in moments or all(name in tapped for name in names):
        return batches
    return [sample for batch in batches for sample in split_samples(batch)]


def split_parameters(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Collection[str],
    moments: Collection[str],
    memory: int | None,
) -> list[list[str]]:
    """Split parameters, in execution order, into runs whose moments fit into `memory` bytes.

    The last layers come first: a backward pass ends at the first parameter of its run.
    """
    if memory is None or len(batches) == 1:
        return [list(names)]
    parts: list[list[str]] = [[]]
    left = memory
    for name in reversed(list(names)):
        parameter = model.get_parameter(name)
        need = parameter.numel() * max(parameter.element_size(), 4) * len(moments)
        if parts[-1] and need > left:
            parts.append([])
            left = memory
        parts[-1].append(name)
        left -= need
    return parts
