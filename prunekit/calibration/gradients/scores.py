"""Scores from gradients: g = ∂L/∂W, and the diagonal F_kk = Σ_j g_jk² of the Fisher information.

L is the mean loss over all targets of the calibration set, g_j the gradient of sample j's own mean
loss over its n_j targets, so that g = Σ_j n_j g_j / Σ_j n_j. For a linear module g_j is the product
of its inputs and its output gradients over the positions of sample j: one backward pass gives those
of all samples of a batch. For any other parameter each sample takes a backward pass of its own.

What a model of 7B takes in bfloat16 (32 layers of 4,096), computed and not measured: its weights
are 13.5 GB; for each token a forward pass keeps 204 kB a layer and 289 kB in the head, 8.7 GB for
10 samples of 128 tokens. On a GPU of 24 GB that is more than 0.4 of the 11.7 GB that are left, so
layers are computed again: their inputs take 0.34 GB then, the layer in work 0.26, the head 0.37,
and the largest matrix, with its gradient in float32 and what is computed from it, 0.7: 15.2 GB in
all. Moments of several batches, where they can't be reduced batch by batch, take up to 4.7 GB more,
in 6 passes over the data for first order (25.9 GB in one) and 12 for both orders.

A larger GPU keeps the activations: to compute layers again would take a third more time there, for
memory that nobody asks for. First order of these 10 samples stays below 24 GB so too: 21.4 GB were
measured on one of 80 GB. A limit in bytes would have to be right for every model and every GPU.
"""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from prunekit.calibration.gradients.passes import FISHER, Elements, GradientPass
from prunekit.calibration.gradients.state import SHARE, recomputing, should_recompute
from prunekit.calibration.gradients.tapped import TappedLinear, find_tapped
from prunekit.data.batches import Batch, split_samples
from prunekit.graph import CouplingGraph, Group
from prunekit.graph.groups import ParameterDim
from prunekit.runtime.console import say
from prunekit.runtime.memory import free_bytes
from prunekit.runtime.modes import undisturbed


def score_positions(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    elements: Elements,
    *,
    moments: Collection[str],
    linear: bool = False,
    memory: int | None = None,
    checkpointing: bool | None = None,
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
        linear: whether the elements of a sum of moments are the sum of the moments' elements.
        memory: the bytes that accumulated moments may take; parameters beyond that wait for another
            pass over the calibration set. None: `SHARE` of the free memory. The gradients of a
            single batch are reduced one by one, those of linear elements batch by batch: they need
            no such memory.
        checkpointing: compute layers again in the backward pass instead of keeping activations.
            None: where they would take more than `SHARE` of the free memory.

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
        apart = split_batches(batches, dims, tapped, moments)
        if checkpointing is None:
            checkpointing = should_recompute(model, apart, dims)
        with recomputing(model, checkpointing):
            parts = (
                [list(dims)] if linear else split_parameters(model, apart, dims, moments, memory)
            )
            for part in parts:
                own = {name: dims[name] for name in part}
                run = GradientPass(model, own, tapped, tuple(moments), elements, linear)
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
    if len(batches) == 1:
        return [list(names)]
    parts: list[list[str]] = [[]]
    memory = memory or int(SHARE * free_bytes(next(model.parameters()).device))
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
