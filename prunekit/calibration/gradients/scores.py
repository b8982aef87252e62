"""Scores from gradients over a calibration set: g = ∂L/∂W and the Fisher information's diagonal
F_kk = Σ_j g_jk².

L is the mean loss over all targets, g_j the gradient of sample j's own mean loss over its n_j
targets, so that g = Σ_j n_j g_j / Σ_j n_j. A linear module's g_j is the product of its inputs and
its output's gradients over sample j's positions: one backward pass gives those of all samples of a
batch. For any other parameter each sample takes its own.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.loss import is_language_model, mean_loss, split
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

MEAN, FISHER = "mean", "fisher"
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
    """For each (parameter, dim) among the groups' members, |Σ_k e_k| at every position along that
    dim.

    The model is left as it was, whatever happens.

    Args:
        model: any module with a loss.
        graph: its coupling graph.
        groups: whose members are scored.
        batches: the calibration set, keyword arguments of forward calls.
        elements: (parameter, moments) → e of the parameter's shape.
        moments: what `elements` needs: "mean", g, and "fisher", F, of the parameter's shape,
            float32 or better.
        memory: the bytes that accumulated moments may take; parameters
            beyond that wait for further passes over the
            calibration set. None for one pass. A single batch is reduced gradient by gradient and
            needs none of it.
        checkpointing: recompute layers in the backward pass instead of keeping their activations.

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
        tapped = _tapped(model, batches, dims) if FISHER in moments else {}
        if FISHER in moments and (others := [name for name in dims if name not in tapped]):
            say(f"Fisher information: sample by sample, for {others[0]} and {len(others) - 1} more")
        with checkpointed(model, checkpointing):
            for part in _parts(
                model, _passes(batches, dims, tapped, moments), dims, moments, memory
            ):
                run = _Pass(
                    model, {name: dims[name] for name in part}, tapped, tuple(moments), elements
                )
                scores |= run.scores(_passes(batches, part, tapped, moments))
    return scores


@dataclass(frozen=True)
class _Linear:
    """A module of which a single call makes x [B, T, in] into [B, T, out]; the parameter is its
    weight or its bias.
    """

    module: nn.Module
    attribute: str


@dataclass
class _Pass:
    """One pass over the calibration set for some parameters."""

    model: nn.Module
    dims: Mapping[str, Sequence[int]]
    tapped: Mapping[str, _Linear]
    moments: Sequence[str]
    elements: Elements
    counts: tuple[int, ...] = ()
    calls: set[nn.Module] = field(default_factory=set)
    forward: bool = False
    totals: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    found: dict[Place, Tensor] = field(default_factory=dict)

    def scores(self, batches: Sequence[Batch]) -> dict[Place, Tensor]:
        """(parameter, dim) → |Σ_k e_k| per position."""
        targets = 0
        with self._hooks(single=len(batches) == 1):
            for batch in track(batches, "gradients", len(batches)):
                targets += self._backward(batch)
        if not targets:
            raise DataError("calibration: it holds not a single token to predict")
        for name in self.dims:
            if (name, self.dims[name][0]) not in self.found:
                self._finish(name, targets)
        return self.found

    def _backward(self, batch: Batch) -> int:
        """Run the model forwards and backwards; how many targets the batch holds."""
        self.calls.clear()
        self.forward = True
        loss = mean_loss(self.model, batch, by_sample=bool(self.tapped))
        self.forward, self.counts = False, loss.counts
        if (targets := sum(loss.counts)) and loss.value.requires_grad:
            loss.value.backward()
        return targets

    @contextmanager
    def _hooks(self, single: bool) -> Iterator[None]:
        """Collect what the backward passes bring; `single`: it is one, and a gradient's last use
        follows at once.
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
        """A gradient of the batch's mean loss, from autograd itself."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._add(name, gradient, sum(self.counts))
        if single:
            self._finish(name, sum(self.counts))

    def _keep(self, module: nn.Module, names: Mapping[str, str], x: Tensor) -> Tensor:
        if self.forward and module in self.calls:
            raise DataError(
                f"{next(iter(names.values()))}: its module runs more than once for some of the samples"
            )
        if self.forward:
            self.calls.add(module)
        return x

    def _receive(
        self, names: Mapping[str, str], transposed: bool, single: bool, x: Tensor, delta: Tensor
    ) -> None:
        """From x [B, T, in], δ [B, T, out] of a linear module, each sample's δ that of its own mean
        loss.
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
        """Count in a gradient of the mean loss over `count` targets."""
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
        """Reduce a parameter's moments to scores and let go of them; one without a gradient has
        zeros.
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
        found = self.elements(weight, moments)
        self.found |= {(name, dim): along(found, dim).abs().cpu() for dim in self.dims[name]}


def _passes(
    batches: Sequence[Batch],
    names: Collection[str],
    tapped: Mapping[str, _Linear],
    moments: Collection[str],
) -> Sequence[Batch]:
    """The batches, or each sample in one of its own where the Fisher information of an untapped
    parameter wants it.
    """
    if FISHER not in moments or all(name in tapped for name in names):
        return batches
    return [sample for batch in batches for sample in split(batch)]


def _parts(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Collection[str],
    moments: Collection[str],
    memory: int | None,
) -> list[list[str]]:
    """Runs of parameters in execution order whose accumulated moments fit into `memory`, the last
    layers first.

    A part's backward pass ends at its first parameter.
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


def _tapped(
    model: nn.Module, batches: Sequence[Batch], names: Collection[str]
) -> dict[str, _Linear]:
    """Which of these parameters a stock linear module alone holds and uses once a forward pass on
    [B, T, in].

    Tried on the first sample, whose [1, T] can be no other two axes. None where the model isn't a
    language model.
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
    sample = split(batches[0])[0]
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
