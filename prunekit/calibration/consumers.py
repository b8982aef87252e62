"""Consumers: the matrices that the units of a group feed, whatever their layout in memory.

A consumer is a parameter in one use of it: the product over the units. A parameter may have other
uses (an embedding that is tied to the head is looked up), whose inputs say nothing of the units.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunekit.calibration.gradients.taps import input_of
from prunekit.errors import TraceError
from prunekit.graph import Group, Member
from prunekit.model.compat import experts_computed
from prunekit.model.linear import is_stock, places_of_product
from prunekit.model.ties import Place, parameter_places
from prunekit.runtime.modes import at_rest
from prunekit.runtime.numbers import computing_type

See = Callable[["Consumer", Tensor], None]  # see(consumer, inputs [..., n])
_MATRIX = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_PRODUCTS = (F.linear, torch.bmm, Tensor.bmm, *_MATRIX)
_SUMS = (torch.addmm, Tensor.addmm)  # the product of the second and the third argument is added
_CASTS = (
    *(Tensor.to, Tensor.type, Tensor.type_as),
    *(Tensor.half, Tensor.bfloat16, Tensor.float, Tensor.double),
)
_ROUNDED = 0.02  # what half precision may make of a product, as a share of it


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """A linear consumer, with its weight as W [d_out, n] whatever its layout.

    `module`: holds the parameter, as its `attribute`, and computes the product over the units.
    `expert`: its place in a stacked parameter [experts, …]; None for a matrix of its own.
    `others`: the linear modules that hold the same parameter, which all change with it.
    """

    module: nn.Module
    member: Member
    name: str
    expert: int | None = None
    attribute: str = "weight"
    others: tuple[nn.Module, ...] = ()

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The module and the others."""
        return self.module, *self.others

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight, of all experts where they are stacked."""
        parameter = getattr(self.module, self.attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def is_reused(self) -> bool:
        """Whether a forward pass computes the product more than once."""
        return self.member.reused

    @property
    def is_repairable(self) -> bool:
        """Whether the columns that stay may change: no other use of the parameter reads them."""
        return not self.member.elsewhere

    @property
    def is_stock(self) -> bool:
        """Whether the modules are all stock ones."""
        return self.expert is None and all(is_stock(module) for module in self.modules)

    @property
    def is_hooked(self) -> bool:
        """Whether the module is sure to be called with the inputs of the product: one stock module.

        Of the rest the products themselves have to be watched.
        """
        return self.is_stock and not self.others

    @cached_property
    def is_linear(self) -> bool:
        """Whether the outputs of the module are x Wᵀ + b, so that they may have a target."""
        if self.expert is not None or self.others:
            return False
        return is_stock(self.module) or (self.is_repairable and self._is_linear())

    def _is_linear(self) -> bool:
        """Whether the module gives x Wᵀ + b of two random tokens; on meta, with random weights."""
        if self.parameter.is_meta:
            module = copy.deepcopy(self.module).to_empty(device="cpu")
            generator = torch.Generator().manual_seed(1)  # the program's own draws stay as they are
            for parameter in module.parameters():
                nn.init.normal_(parameter, generator=generator)
            return replace(self, module=module)._is_linear()
        weight = self.weight()
        x = torch.randn(weight.shape[1] * 2, generator=torch.Generator().manual_seed(0))
        x = x.view(1, 2, -1).to(self.parameter)
        with at_rest(self.module), torch.no_grad(), suppress(Exception):
            return self.gives(x, self.module.forward(x))
        return False

    def gives(self, inputs: Tensor, output: Tensor) -> bool:
        """Whether an output [..., d_out] is x Wᵀ + b of inputs [..., n], but for rounding."""
        with torch._C.DisableTorchFunction():  # nobody is to see this product
            weight, bias = self.weight(), getattr(self.module, "bias", None)
            added = bias.to(weight) if isinstance(bias, Tensor) else None
            wanted = F.linear(inputs.to(weight), weight, added)
            return bool((output - wanted).norm() <= _ROUNDED * wanted.norm())

    def multiply(self, inputs: Tensor) -> Tensor:
        """Inputs [..., n] → x Wᵀ + b [..., d_out], without the hooks of the module."""
        if self.is_hooked:
            return self.module.forward(inputs)
        with torch._C.DisableTorchFunction():
            return F.linear(inputs, self._stored.to(inputs), self.bias)

    @property
    def _stored(self) -> Tensor:
        stored = self.parameter.data if self.expert is None else self.parameter.data[self.expert]
        return stored if self.member.dim == self.parameter.ndim - 1 else stored.T

    @property
    def stacked(self) -> int:
        """How many matrices the parameter holds."""
        return 1 if self.expert is None else len(self.parameter)

    @property
    def outputs(self) -> int:
        """Number of output features d_out."""
        return self.parameter.shape[
            {1: 2, 2: 1}[self.member.dim] if self.expert is not None else 1 - self.member.dim
        ]

    @property
    def stride(self) -> int:
        """The distance in memory of two columns of W, which tells them from its rows."""
        return self.parameter.stride(self.member.dim)

    def weight(self) -> Tensor:
        """W [d_out, n], a copy in float32 at least."""
        return self._stored.to(computing_type(self.parameter.dtype), copy=True)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias [d_out] that the module adds to W x; None where it adds none of this name."""
        bias = getattr(self.module, "bias", None)
        return (
            bias if isinstance(bias, nn.Parameter) and (self.is_stock or self.is_linear) else None
        )

    @property
    def can_be_biased(self) -> bool:
        """Whether the module adds a bias, or would if it had one."""
        return self.is_stock or self.bias is not None

    def store(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Write W [d_out, n] back, and add `bias` [d_out] to the one of the module.

        A module without a bias gets this one.
        """
        self._stored.copy_(weight)
        if bias is not None:
            self.set_bias(bias if self.bias is None else self.bias.data + bias.to(self.bias))

    def set_bias(self, bias: Tensor) -> None:
        """Give the module this bias [d_out]; the biases of the others change by as much."""
        bias = bias.to(self.parameter)
        if self.bias is None:
            for module in self.modules:
                requires_grad = self.parameter.requires_grad
                module.bias = nn.Parameter(bias.clone(), requires_grad=requires_grad)
            return
        for other in {module.bias for module in self.others} - {self.bias}:
            assert isinstance(other, nn.Parameter)
            other.data.add_(bias - self.bias.data)
        self.bias.data.copy_(bias)

    def drop_bias(self) -> None:
        """Take the bias from the module, and from the others."""
        for module in self.modules:
            module.register_parameter("bias", None)


def find_consumers(model: nn.Module, group: Group) -> list[Consumer]:
    """The linear consumers of a group.

    Raises:
        TraceError: the group has no consumer, or one that is no matrix that a product sums over.
    """
    places = parameter_places(model)
    consumers = []
    for member in group.consumers:
        shape = model.get_parameter(member.parameter).shape
        own = places_of_product(places[member.parameter])
        module, *others = (place.module for place in own)
        if fault := _find_fault(member, shape, own):
            raise TraceError(f"{group.name}: layer-wise pruning expects {fault}")
        experts: Sequence[int | None] = range(shape[0]) if len(shape) == 3 else [None]
        consumers += [
            Consumer(
                module=module,
                member=member,
                name=own[0].name.rpartition(".")[0],
                expert=expert,
                attribute=own[0].attribute,
                others=tuple(others),
            )
            for expert in experts
        ]
    if not consumers:
        raise TraceError(f"{group.name}: layer-wise pruning expects a linear consumer, found none")
    return consumers


def _find_fault(member: Member, shape: Sequence[int], own: Sequence[Place]) -> str | None:
    """What is expected of a member of this shape and isn't there; None where it is a consumer.

    `own`: the places of the parameter in modules that compute its product.
    """
    name, modules = member.parameter, [place.module for place in own]
    if own[0].attribute != "weight" and is_stock(modules[0]):
        return f"a weight that is a parameter, {name} is one that it is computed from"
    if len(shape) not in (2, 3) or (len(shape) == 3 and member.dim == 0):
        return f"matrices, {name} is none"
    if member.partly:
        return f"a product with all of a matrix, {name} is used in parts"
    # What such a product is fed isn't what its module is, and the module's bias isn't its own.
    if member.apart and len(shape) == 2 and (is_stock(modules[0]) or not member.elsewhere):
        return f"a product that is the call of one module, {name} is used outside of it, too"
    if len(modules) > 1 and len({module.bias is None for module in modules}) > 1:
        return f"a bias in all modules that hold {name}, or in none"
    return None


def find_lone_consumer(model: nn.Module, group: Group) -> Consumer | None:
    """The consumer of a group that has a single one, in a module of its own; else None."""
    try:
        consumers = find_consumers(model, group)
    except TraceError:
        return None
    return consumers[0] if len(consumers) == 1 and consumers[0].is_linear else None


@contextmanager
def watching(consumers: Sequence[Consumer], see: See) -> Iterator[None]:
    """Inside the `with` block, call `see(consumer, inputs)` for everything consumers are fed."""
    with ExitStack() as stack:
        for consumer in (c for c in consumers if c.is_hooked):
            show = partial(_show_inputs, consumer, see)
            hook = consumer.module.register_forward_pre_hook(show, with_kwargs=True)
            stack.callback(hook.remove)
        if others := [c for c in consumers if not c.is_hooked]:
            stack.enter_context(_Products(others, see))
        yield


def _show_inputs(
    consumer: Consumer, see: See, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Forward pre-hook of a consumer's module, once the first two arguments are bound."""
    see(consumer, input_of(args, kwargs))


@contextmanager
def running_experts_in_turn(model: nn.Module, consumers: Sequence[Consumer]) -> Iterator[None]:
    """Compute stacked experts one by one in a `with` block, so that `watching` sees each."""
    stacked = any(consumer.expert is not None for consumer in consumers)
    with experts_computed(model, "eager") if stacked else nullcontext():
        yield


class _Products(TorchFunctionMode):
    """Sees matrix products with parameters, of experts [experts, …] too.

    A product with one expert's slice, which is a new tensor each time, is known by the address of
    its memory, and by the dim of the parameter that it sums over; a batched product with the whole
    parameter shows the inputs of all experts. A matrix that is cast first is followed. `others`:
    the consumers whose weight something else was computed from.
    """

    def __init__(self, consumers: Sequence[Consumer], see: See) -> None:
        super().__init__()
        self.see = see
        self.places = {c.parameter.data_ptr() + (c.expert or 0) * _stride(c): c for c in consumers}
        self.whole: dict[int, list[Consumer]] = defaultdict(list)
        self.casts: dict[Consumer, Tensor] = {}  # held, so that no other tensor gets their memory
        self.others: set[Consumer] = set()
        for consumer in consumers:
            self.whole[consumer.parameter.data_ptr()].append(consumer)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        shown = False
        if func in _PRODUCTS:
            shown = self._look(func, *args, *kwargs.values())
        elif func in _SUMS:
            shown = self._look(func, *args[1:])
        elif func is torch.einsum:
            shown = self._look_at_sum(*args)
        result = func(*args, **kwargs)
        if func in _CASTS and result is not args[0] and self._find(args[0]):
            self._follow(args[0], result)
        elif not shown and isinstance(result, Tensor) and result.is_floating_point():
            own = result.untyped_storage().data_ptr()
            for arg in args:
                if isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() != own:
                    self.others |= {consumer} if (consumer := self._find(arg)) else set()
        return result

    def _follow(self, source: Tensor, cast: Tensor) -> None:
        """Know a cast of a consumer's weight, or of a whole stack, as what it was cast from."""
        stack = self.whole.get(source.data_ptr(), [])
        if cast.ndim == 3 and len(cast) == len(stack):
            self.whole[cast.data_ptr()] = stack
            self.casts |= dict(zip(stack, cast, strict=True))
        elif consumer := self._find(source):
            self.casts[consumer] = cast

    def _look(self, func: Any, inputs: Any = None, weight: Any = None, *_: Any) -> bool:
        """Show the inputs of a product with the weight of a consumer; False where it is none."""
        if not isinstance(weight, Tensor):
            return False
        if weight.ndim == 2 and (consumer := self._find_matrix(weight)):
            if found := weight.stride(1 if func is F.linear else 0) == consumer.stride:
                self.see(consumer, inputs)
            return found
        stack = self.whole.get(weight.data_ptr(), []) if weight.ndim == inputs.ndim == 3 else []
        if stack and len(stack) == len(weight):
            for consumer, own in zip(stack, inputs, strict=True):
                self.see(consumer, own)
            return True
        if func in _MATRIX and inputs.ndim == 2 and weight.ndim > 1:  # W x, with x [..., n, T]
            return self._show_columns(inputs, 1, weight, -2)
        return False

    def _look_at_sum(self, equation: Any, *operands: Any) -> bool:
        """Show the inputs of an einsum of a weight and one other tensor, such as "bti,oi->bto"."""
        if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
            return False
        terms, output = equation.replace(" ", "").split("->")
        names = dict(zip(operands, terms.split(","), strict=True))
        for weight, inputs in (operands, operands[::-1]):
            of_weight, of_inputs = names[weight], names[inputs]
            summed = [k for k, name in enumerate(of_weight) if name not in output]
            if weight.ndim != 2 or "." in of_weight or len(summed) != 1:
                continue
            name = of_weight[summed[0]]
            if set(of_inputs) - set(output) != {name} or set(of_inputs) & set(of_weight) != {name}:
                continue
            before, _, behind = of_inputs.partition(name)
            dim = -1 - len(behind) if "." in before else len(before)
            if self._show_columns(weight, summed[0], inputs, dim):
                return True
        return False

    def _show_columns(self, weight: Tensor, summed: int, inputs: Tensor, dim: int) -> bool:
        """Show inputs whose `dim` is multiplied with the dim `summed` of a consumer's weight."""
        consumer = self._find_matrix(weight)
        if consumer is None or weight.stride(summed) != consumer.stride:
            return False
        last = dim % inputs.ndim == inputs.ndim - 1
        self.see(consumer, inputs if last else inputs.movedim(dim, -1))
        return True

    def _find(self, weight: Tensor) -> Consumer | None:
        """The consumer whose weight, or a cast of it, begins in memory where a tensor does."""
        address = weight.data_ptr()
        casts = (c for c, cast in self.casts.items() if cast.data_ptr() == address)
        return self.places.get(address) or next(casts, None)

    def _find_matrix(self, weight: Tensor) -> Consumer | None:
        """The consumer whose whole weight, or a cast of it, a matrix is."""
        consumer = self._find(weight)
        whole = consumer and weight.numel() == consumer.parameter.shape.numel() // consumer.stacked
        return consumer if whole else None


def find_unseen(consumers: Sequence[Consumer], run: Callable[[], object]) -> list[Consumer]:
    """The consumers that are at work, and whose inputs are not all seen: other operators take them.

    A stacked expert counts as seen where one of its stack is: a few tokens don't reach them all.

    Args:
        consumers: of one model.
        run: runs the model once.
    """
    watched = [consumer for consumer in consumers if not consumer.is_hooked]
    if not watched:
        return []
    seen, ran = set[Any](), set[Any]()
    with ExitStack() as stack:
        for module in {consumer.module for consumer in watched}:
            if type(module).forward is nn.Module.forward:  # it holds weights and is never called
                ran.add(module)
            note = partial(_note_run, ran, module)
            stack.callback(module.register_forward_pre_hook(note).remove)
        products = stack.enter_context(_Products(watched, partial(_note_seen, seen)))
        run()
    others = {_stack_of(consumer) for consumer in products.others if consumer.is_repairable}
    return [
        c
        for c in watched
        if c.module in ran and (_stack_of(c) not in seen or _stack_of(c) in others)
    ]


def _stack_of(consumer: Consumer) -> Any:
    """The use of a parameter that the consumer is, or is a part of."""
    return consumer.module, consumer.attribute, consumer.member.dim


def _note_run(ran: set[Any], module: nn.Module, *_: Any) -> None:
    """Forward pre-hook of a module, once the first two arguments are bound."""
    ran.add(module)


def _note_seen(seen: set[Any], consumer: Consumer, _: Tensor) -> None:
    seen.add(_stack_of(consumer))


def _stride(consumer: Consumer) -> int:
    """Bytes from one expert's slice to the next."""
    return consumer.parameter.stride(0) * consumer.parameter.element_size()
