"""Walk a model's groups in execution order and show each one the second moments of its consumer's inputs.

Between two groups the caller may change the consumer's weight: what comes later sees the new activations (SlimGPT: the
inputs of a layer come from the pruned layers before it; in a layer attention first, then its FFN on the new inputs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.compensation.hessian import Moments
from prunekit.console import say
from prunekit.errors import DataError, TraceError
from prunekit.graph import CoupledGroup, Member

Batch = Mapping[str, Any]


class _Stop(Exception):
    """Everything wanted of this forward pass has been seen."""


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A linear consumer: its weight as W [d_out, n] whatever its layout."""

    module: nn.Module
    member: Member
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The stored weight."""
        parameter = getattr(self.module, self.member.parameter.rsplit(".", 1)[-1])
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def weight(self) -> Tensor:
        """W [d_out, n], float64."""
        weight = self.parameter.detach().double()
        return weight if self.member.dim == 1 else weight.T

    def store(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Write W [d_out, n] back; add `bias` [d_out] to the module's, which gets one where it has none."""
        self.parameter.data.copy_(weight if self.member.dim == 1 else weight.T)
        if bias is None:
            return
        own = getattr(self.module, "bias", None)
        if not isinstance(own, nn.Parameter):
            zeros = torch.zeros_like(weight[:, 0], dtype=self.parameter.dtype)
            own = self.module.bias = nn.Parameter(zeros, requires_grad=self.parameter.requires_grad)
        own.data.add_(bias)


def consumer_of(model: nn.Module, group: CoupledGroup) -> Consumer:
    """The group's one linear consumer; TraceError where it has none, several, or one that is no matrix."""
    if len(group.consumers) != 1:
        found = ", ".join(member.parameter for member in group.consumers) or "none"
        raise TraceError(f"{group.name}: layer-wise pruning expects one consumer, found {found}")
    member = group.consumers[0]
    path = member.parameter.rpartition(".")[0]
    module = model.get_submodule(path)
    if model.get_parameter(member.parameter).ndim != 2:
        raise TraceError(f"{group.name}: layer-wise pruning expects a matrix, {member.parameter} is none")
    return Consumer(module=module, member=member, name=path)


def walk(
    model: nn.Module, groups: Sequence[CoupledGroup], batches: Sequence[Batch]
) -> Iterator[tuple[CoupledGroup, Consumer, Moments]]:
    """Yield (group, consumer, moments) in execution order; the caller may change the consumer before going on."""
    training = model.training
    model.eval()
    try:
        stream = _Stream.open(model, groups, batches)
        if stream is None:
            say("the layers can't be run one by one: every group takes forward passes of the whole model")
            yield from _whole_model(model, groups, batches)
        else:
            yield from stream.walk(groups)
    finally:
        model.train(training)


def _whole_model(model: nn.Module, groups: Sequence[CoupledGroup], batches: Sequence[Batch]) -> Iterator[Any]:
    for group in groups:
        consumer = consumer_of(model, group)
        moments = _moments(consumer)
        for batch in batches:
            with _observe(consumer, moments, batch), torch.no_grad():
                model(**batch)
        yield group, consumer, moments


def _moments(consumer: Consumer) -> Moments:
    weight = consumer.parameter
    return Moments(weight.shape[consumer.member.dim], consumer.name, weight.device)


class _observe:
    """Feed the inputs of a consumer to its moments during a `with` block, and end the block there."""

    def __init__(self, consumer: Consumer, moments: Moments, batch: Batch) -> None:
        self.consumer, self.moments = consumer, moments
        mask = batch.get("attention_mask")
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.bool().all() else None

    def __enter__(self) -> None:
        self.handle = self.consumer.module.register_forward_pre_hook(self._hook)

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> bool:
        self.handle.remove()
        return kind is _Stop

    def _hook(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.moments.add(args[0], self.mask)
        raise _Stop


@dataclass
class _LayerCall:
    """One layer's call on one batch, the hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Stream:
    """The decoder layers one by one: the hidden states of all batches between two of them are all that is kept."""

    model: nn.Module
    layers: nn.ModuleList
    batches: Sequence[Batch]
    hidden: list[Tensor]
    calls: list[list[_LayerCall]]  # [batch][layer]

    @classmethod
    def open(cls, model: nn.Module, groups: Sequence[CoupledGroup], batches: Sequence[Batch]) -> _Stream | None:
        """Record what the layers are called with; None where they don't feed one another in order."""
        paths = {".".join(_until_layer(group)) for group in groups}
        if len(paths) != 1 or None in {group.layer for group in groups}:
            return None
        layers = model.get_submodule(paths.pop())
        assert isinstance(layers, nn.ModuleList)
        stream = cls(model, layers, batches, [], [])
        return stream if all(stream._record(batch) for batch in batches) else None

    def _record(self, batch: Batch) -> bool:
        calls: list[_LayerCall] = []
        previous: list[Tensor] = []
        chained = True

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal chained
            if not args or not isinstance(args[0], Tensor) or layer is not self.layers[len(calls)]:
                chained = False
                raise _Stop
            if calls:
                chained = chained and args[0] is previous[-1]
            else:
                self.hidden.append(args[0].detach())
            calls.append(_LayerCall(args[1:], dict(kwargs)))

        def after(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            previous[:] = [_first(output)]
            if len(calls) == len(self.layers):
                raise _Stop

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        handles += [layer.register_forward_hook(after) for layer in self.layers]
        try:
            with torch.no_grad():
                self.model(**batch)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        self.calls.append(calls)
        return chained and len(calls) == len(self.layers)

    def walk(self, groups: Sequence[CoupledGroup]) -> Iterator[tuple[CoupledGroup, Consumer, Moments]]:
        last = max(group.layer for group in groups if group.layer is not None)
        for i in range(last + 1):
            for group in (g for g in groups if g.layer == i):
                consumer = consumer_of(self.model, group)
                moments = _moments(consumer)
                for b, batch in enumerate(self.batches):
                    with _observe(consumer, moments, batch):
                        self._run(i, b)
                yield group, consumer, moments
            self.hidden = [self._run(i, b) for b in range(len(self.batches))]
            if not all(torch.isfinite(hidden).all() for hidden in self.hidden):
                raise DataError(f"layer {i}: its outputs hold NaN or infinity")

    @torch.no_grad()
    def _run(self, layer: int, batch: int) -> Tensor:
        call = self.calls[batch][layer]
        return _first(self.layers[layer](self.hidden[batch], *call.args, **call.kwargs))


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _until_layer(group: CoupledGroup) -> list[str]:
    parts = group.module.split(".")
    return parts[: parts.index(str(group.layer))] if group.layer is not None else parts
