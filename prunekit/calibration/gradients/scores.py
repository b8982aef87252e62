"""Scores from gradients: g = ∂L/∂W, and the diagonal F_kk = Σ_j g_jk² of the Fisher information.

L is the mean loss over all targets of the calibration set, g_j the gradient of sample j's own mean
loss over its n_j targets, so that g = Σ_j n_j g_j / Σ_j n_j. For a linear module g_j is the product
of its inputs and its output gradients over the positions of sample j: one backward pass gives those
of all samples of a batch. For any other parameter each sample takes a backward pass of its own.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.loss import is_language_model, mean_loss, split_samples
from prunekit.calibration.gradients.state import checkpointed
from prunekit.calibration.gradients.taps import is_stock, is_transposed, tap
from prunekit.data.batches import Batch
from prunekit.errors import DataError
from prunekit.graph import CouplingGraph, Group
from prunekit.graph.groups import Place
from prunekit.model.inputs import without_cache
from prunekit.model.ties import tensor_places
from prunekit.runtime.console import say, track
from prunekit.runtime.modes import undisturbed
from prunekit.runtime.numbers import along, at_least_float32

MEAN, FISHER = "mean", "fisher"  # of the gradients: g and F
Moments = Mapping[str, Tensor]
Elements = Callable[[Tensor, Moments], Tensor]


def position_scores(
    model: nn.Module,
    graph: CouplingGraph,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    elements: Elements,
    *,
    moments: Collection[str],
    memory: int | None = None,
    checkpointing: bool = False,
) -> dict[Place, Tensor]:
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
    scores: dict[Place, Tensor] = {}
    with undisturbed(model):
        tapped = _find_tapped(model, batches, dims) if FISHER in moments else {}
        if FISHER in moments and (others := [name for name in dims if name not in tapped]):
            say(f"Fisher information: sample by sample, for {others[0]} and {len(others) - 1} more")
        with checkpointed(model, checkpointing):
            for part in _split_parameters(
                model, _split_batches(batches, dims, tapped, moments), dims, moments, memory
            ):
                run = _Pass(
                    model, {name: dims[name] for name in part}, tapped, tuple(moments), elements
                )
                scores |= run.score(_split_batches(batches, part, tapped, moments))
    return scores


@dataclass(frozen=True)
class _Linear:
    """A linear module that runs once a forward pass, on x [B, T, in].

    `attribute`: weight or bias, whichever the parameter is.
    """

    module: nn.Module
    attribute: str


@dataclass
class _Pass:
    """One pass over the calibration set for some parameters.

    `dims`: parameter → the dims to score. `tapped`: parameter → its linear module, for those whose
    gradients come from taps. `counts`: the targets of the batch in turn (`Loss.counts`). `totals`:
    parameter → its moments so far. `reduced`: the scores of the parameters that are finished.
    """

    model: nn.Module
    dims: Mapping[str, Sequence[int]]
    tapped: Mapping[str, _Linear]
    moments: Sequence[str]
    elements: Elements
    counts: tuple[int, ...] = ()
    calls: set[nn.Module] = field(default_factory=set)
    forward: bool = False
    totals: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    reduced: dict[Place, Tensor] = field(default_factory=dict)

    def score(self, batches: Sequence[Batch]) -> dict[Place, Tensor]:
        """(parameter, dim) → |Σ_k e_k| per position."""
        targets = 0
        with self._hooks(single=len(batches) == 1):
            for batch in track(batches, "gradients", len(batches)):
                targets += self._backward(batch)
        if not targets:
            raise DataError("calibration: it holds not a single token to predict")
        for name in self.dims:
            if (name, self.dims[name][0]) not in self.reduced:
                self._finish(name, targets)
        return self.reduced

    def _backward(self, batch: Batch) -> int:
        """Run the model forwards and backwards on a batch; the number of its targets."""
        self.calls.clear()
        self.forward = True
        loss = mean_loss(self.model, batch, by_sample=bool(self.tapped))
        self.forward, self.counts = False, loss.counts
        if (targets := sum(loss.counts)) and loss.value.requires_grad:
            loss.value.backward()
        return targets

    @contextmanager
    def _hooks(self, single: bool) -> Iterator[None]:
        """Collect gradients in the backward passes inside the `with` block.

        With a `single` batch each parameter is finished as soon as its gradient is there.
        """
        modules: dict[nn.Module, dict[str, str]] = {}
        with ExitStack() as stack:
            for name in self.dims:
                if linear := self.tapped.get(name):
                    modules.setdefault(linear.module, {})[linear.attribute] = name
                else:
                    parameter = self.model.get_parameter(name).requires_grad_(True)
                    stack.callback(parameter.requires_grad_, False)
                    take = partial(self._take, name, single)
                    stack.callback(parameter.register_post_accumulate_grad_hook(take).remove)
            for module, names in modules.items():
                receive = partial(self._receive, names, is_transposed(module), single)
                stack.callback(tap(module, partial(self._keep, module, names), receive).remove)
            yield

    def _take(self, name: str, single: bool, parameter: Tensor) -> None:
        """Take the gradient of a batch's mean loss from autograd (a hook of the parameter)."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._add(name, gradient, sum(self.counts))
        if single:
            self._finish(name, sum(self.counts))

    def _keep(self, module: nn.Module, names: Mapping[str, str], x: Tensor) -> Tensor:
        """Keep x, and refuse modules that run twice: `_find_tapped` tried one sample alone."""
        if self.forward and module in self.calls:
            raise DataError(
                f"{next(iter(names.values()))}: its module runs more than once for some of the "
                "samples"
            )
        if self.forward:
            self.calls.add(module)
        return x

    def _receive(
        self, names: Mapping[str, str], transposed: bool, single: bool, x: Tensor, delta: Tensor
    ) -> None:
        """Add each sample's gradients from x [B, T, in] and δ [B, T, out] of a linear module.

        The loss is the sum of the samples' own means, so that δ[j] is of sample j's mean alone.
        """
        for j, count in enumerate(self.counts):
            if count and (name := names.get("weight")):
                left, right = (x[j], delta[j]) if transposed else (delta[j], x[j])
                self._add(name, left.T @ right, count)
            if count and (name := names.get("bias")):
                self._add(name, delta[j].sum(0), count)
        for name in names.values() if single else ():
            self._finish(name, sum(self.counts))

    def _add(self, name: str, gradient: Tensor, count: int) -> None:
        """Add the gradient of a mean loss over `count` targets to the moments."""
        gradient = at_least_float32(gradient)
        totals = self.totals.setdefault(name, {})
        if FISHER in self.moments:
            if FISHER not in totals:
                totals[FISHER] = torch.zeros_like(gradient)
            totals[FISHER].addcmul_(gradient, gradient)
        if MEAN in self.moments:
            totals[MEAN] = (
                totals[MEAN].add_(gradient, alpha=count) if MEAN in totals else gradient.mul_(count)
            )

    def _finish(self, name: str, targets: int) -> None:
        """Reduce the moments of a parameter to scores, and let go of them.

        A parameter that the loss does not depend on has moments of zero.
        """
        weight = self.model.get_parameter(name).detach()
        moments = self.totals.pop(name, {})
        for moment in self.moments:
            if moment not in moments:
                moments[moment] = torch.zeros_like(at_least_float32(weight))
        if MEAN in moments:
            moments[MEAN].div_(targets)
        if not all(torch.isfinite(moment).all() for moment in moments.values()):
            raise DataError(f"{name}: its gradient holds NaN or infinity")
        elements = self.elements(weight, moments)
        self.reduced |= {(name, dim): along(elements, dim).abs().cpu() for dim in self.dims[name]}


def _split_batches(
    batches: Sequence[Batch],
    names: Collection[str],
    tapped: Mapping[str, _Linear],
    moments: Collection[str],
) -> Sequence[Batch]:
    """The batches; or each sample as a batch, for the Fisher information of untapped parameters."""
    if FISHER not in moments or all(name in tapped for name in names):
        return batches
    return [sample for batch in batches for sample in split_samples(batch)]


def _split_parameters(
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


def _find_tapped(
    model: nn.Module, batches: Sequence[Batch], names: Collection[str]
) -> dict[str, _Linear]:
    """The parameters that one stock linear module holds and uses once, on inputs [B, T, in].

    Tried on the first sample alone, where no other two axes have the sizes [1, T]. Empty where the
    model is no language model.
    """
    places = tensor_places(model)
    candidates = {
        name: _Linear(places[name][0].module, places[name][0].attribute)
        for name in names
        if len(places[name]) == 1 and is_stock(places[name][0].module)
    }
    shapes: dict[nn.Module, list[tuple[int, ...]]] = {
        linear.module: [] for linear in candidates.values()
    }

    def watch(module: nn.Module, _: object, output: Tensor) -> None:
        shapes[module].append(tuple(output.shape[:-1]))

    if not batches:
        return {}
    sample = split_samples(batches[0])[0]
    with ExitStack() as stack, torch.no_grad():
        for module in shapes:
            stack.callback(module.register_forward_hook(watch).remove)
        outputs = model(**without_cache(model, sample))
    if not is_language_model(outputs, sample):
        return {}
    expected = [tuple(sample["input_ids"].shape)]
    return {
        name: linear for name, linear in candidates.items() if shapes[linear.module] == expected
    }
