"""A pass over the calibration set that reduces the gradients of some parameters to scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.loss import mean_loss
from prunekit.calibration.gradients.tapped import TappedLinear
from prunekit.calibration.gradients.taps import tap
from prunekit.data.batches import Batch
from prunekit.errors import ConfigError, DataError, first_line
from prunekit.graph.groups import ParameterDim
from prunekit.model.updates import is_transposed
from prunekit.runtime.console import track
from prunekit.runtime.numbers import along, at_least_float32, first_false

MEAN, FISHER = "mean", "fisher"  # of the gradients: g and F
GradientMoments = Mapping[str, Tensor]
Elements = Callable[[Tensor, GradientMoments], Tensor]  # (parameter, moments) → e of the same shape


@dataclass
class GradientPass:
    """One pass over the calibration set for some parameters.

    A gradient is taken as soon as the backward pass has made it, before it makes that of the layer
    below, and reduced to scores at once where nothing has to be added to it: where the pass has a
    single batch, or where elements are linear in the moments.

    `dims`: parameter → the dims to score. `tapped`: parameter → its linear module, for those whose
    gradients come from taps. `linear`: whether the elements of a sum of moments are the sum of the
    moments' elements. `counts`: the targets of the batch in turn (`Loss.counts`). `totals`:
    parameter → its moments so far. `sums`: the sums over positions so far, where elements are
    linear. `reduced`: the scores of the parameters that are finished. `finite`: whether their
    gradients are. Both stay on the device until the pass is over: fetching would wait for it.
    """

    model: nn.Module
    dims: Mapping[str, Sequence[int]]
    tapped: Mapping[str, TappedLinear]
    moments: Sequence[str]
    elements: Elements
    linear: bool = False
    counts: tuple[int, ...] = ()
    calls: set[nn.Module] = field(default_factory=set)
    forward: bool = False
    totals: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sums: dict[ParameterDim, Tensor] = field(default_factory=dict)
    reduced: dict[ParameterDim, Tensor] = field(default_factory=dict)
    finite: dict[str, Tensor] = field(default_factory=dict)

    def score(self, batches: Sequence[Batch]) -> dict[ParameterDim, Tensor]:
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
        if (odd := first_false(self.finite)) is not None:
            raise DataError(f"{odd}: its gradient holds NaN or infinity")
        return {place: scores.cpu() for place, scores in self.reduced.items()}

    def _backward(self, batch: Batch) -> int:
        """Run the model forwards and backwards on a batch; the number of its targets."""
        self.calls.clear()
        self.forward = True
        loss = mean_loss(self.model, batch, by_sample=bool(self.tapped))
        self.forward, self.counts = False, loss.counts
        if (targets := sum(loss.counts)) and loss.value.requires_grad:
            _run_backwards(loss.value)
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
        self._reduce(name, single)

    def _keep(self, module: nn.Module, names: Mapping[str, str], x: Tensor) -> Tensor:
        """Keep x, and refuse modules that run twice: `find_tapped` tried one sample alone."""
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
        for name in names.values():
            self._reduce(name, single)

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

    def _reduce(self, name: str, single: bool) -> None:
        """Reduce what a batch has added to the moments of a parameter, where that is possible."""
        if single:
            self._finish(name, sum(self.counts))
        elif self.linear and name in self.totals:
            elements = self.elements(self.model.get_parameter(name).detach(), self.totals.pop(name))
            for dim in self.dims[name]:
                own = along(elements, dim)
                self.sums[name, dim] = (
                    self.sums[name, dim] + own if (name, dim) in self.sums else own
                )

    def _finish(self, name: str, targets: int) -> None:
        """Reduce the moments of a parameter to scores, and let go of them.

        A parameter that the loss does not depend on has moments of zero.
        """
        if (name, self.dims[name][0]) in self.sums:
            self._finish_sums(name, targets)
            return
        weight = self.model.get_parameter(name).detach()
        moments = self.totals.pop(name, {})
        for moment in self.moments:
            if moment not in moments:
                moments[moment] = torch.zeros_like(at_least_float32(weight))
        if MEAN in moments:
            moments[MEAN].div_(targets)
        flags = [torch.isfinite(moment).all() for moment in moments.values()]
        self.finite[name] = torch.stack(flags).all()
        elements = self.elements(weight, moments)
        self.reduced |= {(name, dim): along(elements, dim).abs() for dim in self.dims[name]}

    def _finish_sums(self, name: str, targets: int) -> None:
        """As `_finish`, where the moments of each batch are reduced to sums over positions."""
        count = targets if MEAN in self.moments else 1
        totals = {(name, dim): self.sums.pop((name, dim)) / count for dim in self.dims[name]}
        self.finite[name] = torch.stack([torch.isfinite(t).all() for t in totals.values()]).all()
        self.reduced |= {place: total.abs() for place, total in totals.items()}


def _run_backwards(loss: Tensor) -> None:
    """Run the backward pass.

    Raises:
        ConfigError: the model overwrites what its gradients need.
    """
    try:
        loss.backward()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise ConfigError(
            f"importance: the model overwrites what its gradients need ({first_line(error)}); "
            "expected an importance without gradients, such as magnitude or obs"
        ) from error
