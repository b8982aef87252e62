"""Where the gates of a group lie: on what reads its units, found from the coupling graph alone.

A gate of 0 makes the masked model, the reference of every cut (`prunekit.surgery.masking`). Inputs
of a linear consumer are multiplied by hooks. Where a consumer is no module of its own (stacked
experts, products between activations), the slices are multiplied that the masked model zeroes. A
layer's gate is on what the layer adds to the hidden states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration.consumers import find_consumers
from prunekit.calibration.gradients.taps import input_of
from prunekit.errors import ConfigError, TraceError
from prunekit.graph import CouplingGraph, Group, LayerStack, Member
from prunekit.model.stack import hidden_of_call, hidden_of_output
from prunekit.model.ties import Place, parameter_places
from prunekit.model.updates import is_transposed
from prunekit.runtime.modes import keep_attributes, restoring
from prunekit.surgery.masking import members_to_zero


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapted:
    """A linear module with a low-rank update.

    Attributes:
        base: the module itself.
        around: what calls it, and adds the update.
        down: the linear module of A [r, in].
        up: the linear module of B [out, r].
    """

    base: nn.Module
    around: nn.Module
    down: nn.Module
    up: nn.Module


@dataclass(frozen=True, kw_only=True, eq=False)
class Gate(ABC):
    """One place where gates of a group are put.

    `group` is the name of the group.
    """

    group: str

    @abstractmethod
    def open(self, values: Tensor) -> AbstractContextManager[None]:
        """Put these values [num_units] on the place, for a `with` block."""

    def follow(self, adapted: Mapping[nn.Module, Adapted]) -> list[Gate]:
        """The places of the same gates once modules have low-rank updates, by the module."""
        return [self]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Inputs(Gate):
    """On the inputs of a linear module; `unit_of` [n] is the unit of each input feature."""

    module: nn.Module
    unit_of: Tensor

    @contextmanager
    def open(self, values: Tensor) -> Iterator[None]:
        factors = spread(values, self.unit_of)

        def multiply(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            inputs = input_of(args, kwargs)
            return (inputs * factors.to(inputs), *args[1:]), kwargs if args else {}

        handle = self.module.register_forward_pre_hook(multiply, with_kwargs=True)
        with restoring(handle.remove):
            yield

    def follow(self, adapted: Mapping[nn.Module, Adapted]) -> list[Gate]:
        """On the inputs of what calls the module, so that the update is fed the same."""
        if self.module not in adapted:
            return [self]
        return [replace(self, module=adapted[self.module].around)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slices(Gate):
    """On the slices of a parameter along `dim`; `unit_of` [size of dim] is the unit of each.

    For the time being the modules hold the product as an attribute that hides the parameter.
    """

    places: Sequence[Place]
    dim: int
    unit_of: Tensor

    @contextmanager
    def open(self, values: Tensor) -> Iterator[None]:
        module, attribute, _ = self.places[0]
        weight = getattr(module, attribute)
        shape = [-1 if dim == self.dim else 1 for dim in range(weight.ndim)]
        product = weight * spread(values, self.unit_of).to(weight).view(shape)
        kept = [keep_attributes([place.module], place.attribute) for place in self.places]
        with restoring(*kept):
            for place in self.places:
                vars(place.module)[place.attribute] = product
            yield

    def follow(self, adapted: Mapping[nn.Module, Adapted]) -> list[Gate]:
        """On the rows of B or the columns of A, too."""
        own = adapted.get(self.places[0].module)
        if own is None or self.places[0].attribute != "weight":
            return [self]
        inputs = self.dim != is_transposed(own.base)
        part = own.down if inputs else own.up
        place = Place(part, "weight", "")
        return [self, replace(self, places=[place], dim=int(inputs))]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Layer(Gate):
    """On what a whole layer, the `unit` of its stack, adds to the hidden states."""

    module: nn.Module
    unit: int

    @contextmanager
    def open(self, values: Tensor) -> Iterator[None]:
        value, entered = values[self.unit], list[Tensor]()

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            hidden = hidden_of_call(args, kwargs)
            assert hidden is not None
            entered[:] = [hidden.clone()]  # the layer may write into its input

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            left = hidden_of_output(output)
            assert left is not None
            hidden = torch.lerp(entered.pop().to(left), left, value.to(left))
            return hidden if isinstance(output, Tensor) else type(output)([hidden, *output[1:]])

        hooks = (
            self.module.register_forward_pre_hook(before, with_kwargs=True),
            self.module.register_forward_hook(after, with_kwargs=True),
        )
        with restoring(*(hook.remove for hook in hooks)):
            yield


def find_places(model: nn.Module, graph: CouplingGraph, groups: Sequence[Group]) -> list[Gate]:
    """The places of all gates of these groups.

    Raises:
        ConfigError: a group with a single unit, of which nothing can be learned.
    """
    gates: list[Gate] = []
    if single := [group.name for group in groups if group.num_units < 2]:
        raise ConfigError(
            f"{single[0]}: expected two units or more, between which gates choose, got one; "
            f"scope.exclude=[{','.join(single)}] leaves such groups whole"
        )
    for group in groups:
        if isinstance(group, LayerStack):
            layers = model.get_submodule(group.module)
            gates += [
                _Layer(group=group.name, module=layers.get_submodule(str(unit)), unit=unit)
                for unit in range(group.num_units)
            ]
        else:
            gates += _find_hooked(model, group) or _find_slices(model, graph, group)
    return gates


def _find_hooked(model: nn.Module, group: Group) -> list[Gate]:
    """Gates on the inputs of modules; none where a consumer's inputs can't be hooked."""
    if group.kind == "head_dim":
        return []
    try:
        consumers = find_consumers(model, group)
    except TraceError:
        return []
    places = parameter_places(model)
    alone = all(len(places[c.member.parameter]) == 1 or not c.is_repairable for c in consumers)
    if not alone or not all(consumer.is_hooked for consumer in consumers):
        return []
    return [
        _Inputs(
            group=group.name,
            module=consumer.module,
            unit_of=units_along(consumer.member, consumer.parameter),
        )
        for consumer in consumers
    ]


def _find_slices(model: nn.Module, graph: CouplingGraph, group: Group) -> list[Gate]:
    """Gates on the slices that the masked model zeroes."""
    places = parameter_places(model)
    return [
        _Slices(
            group=group.name,
            places=places[member.parameter],
            dim=member.dim,
            unit_of=units_along(member, model.get_parameter(member.parameter)),
        )
        for member in members_to_zero(group, graph)
    ]


def units_along(member: Member, parameter: Tensor) -> Tensor:
    """The unit that owns each position along a member's dim; num_units where none does."""
    units, width = member.index.shape
    owner = torch.full((parameter.shape[member.dim],), units)
    owner[member.index.flatten()] = torch.arange(units).repeat_interleave(width)
    return owner.to(parameter.device)


def spread(values: Tensor, unit_of: Tensor) -> Tensor:
    """The value of each position's unit; 1 where no unit owns the position."""
    return torch.cat([values, values.new_ones(1)]).to(unit_of.device)[unit_of]


@contextmanager
def gated(gates: Sequence[Gate], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the `with` block, units are multiplied by their values: group name → [num_units].

    Gradients of the values need the backward pass to run inside the block, too.
    """
    with ExitStack() as stack:
        for gate in gates:
            stack.enter_context(gate.open(values[gate.group]))
        yield
