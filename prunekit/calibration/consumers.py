"""Consumers: the matrices that the units of a group feed, whatever their layout in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunekit.errors import TraceError
from prunekit.graph import Group, Member
from prunekit.model.compat import experts_computed
from prunekit.runtime.numbers import widen

See = Callable[["Consumer", Tensor], None]  # see(consumer, inputs [..., n])
_PRODUCTS = (F.linear, torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A linear consumer, with its weight as W [d_out, n] whatever its layout.

    `expert`: its place in a stacked parameter [experts, …]; None for a matrix of its own.
    """

    module: nn.Module
    member: Member
    name: str
    expert: int | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, of all experts where they are stacked."""
        parameter = getattr(self.module, self.member.parameter.rsplit(".", 1)[-1])
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def _stored(self) -> Tensor:
        stored = self.parameter.data if self.expert is None else self.parameter.data[self.expert]
        return stored if self.member.dim == self.parameter.ndim - 1 else stored.T

    @property
    def outputs(self) -> int:
        """Number of output features d_out."""
        return self.parameter.shape[
            {1: 2, 2: 1}[self.member.dim] if self.expert is not None else 1 - self.member.dim
        ]

    def weight(self) -> Tensor:
        """W [d_out, n], a copy in float32 at least."""
        return self._stored.to(widen(self.parameter.dtype), copy=True)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias [d_out] that the module adds to W x; None without one, and for experts."""
        bias = getattr(self.module, "bias", None) if self.expert is None else None
        return bias if isinstance(bias, nn.Parameter) else None

    def store(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Write W [d_out, n] back, and add `bias` [d_out] to the one of the module.

        A module without a bias gets this one.
        """
        self._stored.copy_(weight)
        if bias is not None:
            self.set_bias(bias if self.bias is None else self.bias.data + bias.to(self.bias))

    def set_bias(self, bias: Tensor) -> None:
        """Give the module this bias [d_out]."""
        bias = bias.to(self.parameter)
        if self.bias is None:
            self.module.bias = nn.Parameter(bias, requires_grad=self.parameter.requires_grad)
        else:
            self.bias.data.copy_(bias)


def find_consumers(model: nn.Module, group: Group) -> list[Consumer]:
    """The linear consumers of a group.

    A parameter that also makes the units (a tied embedding) is left out: it can't be repaired.

    Raises:
        TraceError: the group has no consumer, or one that is no matrix.
    """
    made = {member.parameter for member in group.members if member.role == "producer"}
    consumers = []
    for member in group.consumers:
        shape = model.get_parameter(member.parameter).shape
        if len(shape) not in (2, 3) or (len(shape) == 3 and member.dim == 0):
            raise TraceError(
                f"{group.name}: layer-wise pruning expects matrices, {member.parameter} is none"
            )
        if member.parameter in made:
            continue
        path = member.parameter.rpartition(".")[0]
        module = model.get_submodule(path)
        experts: Sequence[int | None] = range(shape[0]) if len(shape) == 3 else [None]
        for expert in experts:
            consumers.append(Consumer(module=module, member=member, name=path, expert=expert))
    if not consumers:
        raise TraceError(f"{group.name}: layer-wise pruning expects a linear consumer, found none")
    return consumers


@contextmanager
def watching(consumers: Sequence[Consumer], see: See) -> Iterator[None]:
    """Inside the `with` block, call `see(consumer, inputs)` for everything consumers are fed."""
    with ExitStack() as stack:
        for consumer in (c for c in consumers if c.expert is None):
            show = partial(_show_inputs, consumer, see)
            stack.callback(consumer.module.register_forward_pre_hook(show).remove)
        if stacked := [c for c in consumers if c.expert is not None]:
            stack.enter_context(_Products(stacked, see))
        yield


def _show_inputs(consumer: Consumer, see: See, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of a consumer's module, once the first two arguments are bound."""
    see(consumer, args[0])


@contextmanager
def running_experts_in_turn(model: nn.Module, consumers: Sequence[Consumer]) -> Iterator[None]:
    """Compute stacked experts one by one in a `with` block, so that `watching` sees each."""
    stacked = any(consumer.expert is not None for consumer in consumers)
    with experts_computed(model, "eager") if stacked else nullcontext():
        yield


class _Products(TorchFunctionMode):
    """Sees matrix products with stacked parameters [experts, …].

    A product with one expert's slice, which is a new tensor each time, is known by the address of
    its memory; a batched product with the whole parameter shows the inputs of all experts.
    """

    def __init__(self, consumers: Sequence[Consumer], see: See) -> None:
        super().__init__()
        self.see = see
        self.places = {c.parameter.data_ptr() + (c.expert or 0) * _stride(c): c for c in consumers}
        self.whole = {
            c.parameter.data_ptr(): [o for o in consumers if o.parameter is c.parameter]
            for c in consumers
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            inputs, weight = args[0], args[1]
            if weight.ndim == 2 and (consumer := self.places.get(weight.data_ptr())):
                self.see(consumer, inputs)
            elif weight.ndim == inputs.ndim == 3 and (all_ := self.whole.get(weight.data_ptr())):
                for consumer, own in zip(all_, inputs, strict=True):
                    self.see(consumer, own)
        return func(*args, **(kwargs or {}))


def _stride(consumer: Consumer) -> int:
    """Bytes from one expert's slice to the next."""
    return consumer.parameter.stride(0) * consumer.parameter.element_size()
