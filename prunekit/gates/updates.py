"""What is trained beside the gates: nothing, low-rank updates (`adapters`), or all weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from prunekit.calibration.gradients.taps import is_transposed
from prunekit.gates.places import Gate
from prunekit.model.ties import parameter_places
from prunekit.runtime.modes import keep_attributes, restoring
from prunekit.runtime.numbers import at_least_float32

# What is added to a weight: U [out, r] and V [r, in], the product of which it is; or itself, in the
# shape of the weight.
Factors = tuple[Tensor, ...]


class Updates(ABC):
    """What is trained beside the gates.

    Attributes:
        parameters: the leaves, by name, on the devices of the weights.
    """

    parameters: dict[str, Tensor]

    @abstractmethod
    def follow(self, gates: Sequence[Gate]) -> list[Gate]:
        """The gates as they must lie once the updates are in the model."""

    @abstractmethod
    def attached(self) -> AbstractContextManager[None]:
        """Inside the `with` block the model computes with its updated weights, else as it did."""

    @abstractmethod
    def remove(self) -> None:
        """Leave the model as it was."""

    @abstractmethod
    def learned(self) -> dict[str, Factors]:
        """Name of a weight → what is to be added to it, on the CPU."""


class Frozen(Updates):
    """Gates are trained alone."""

    def __init__(self) -> None:
        self.parameters = {}

    def follow(self, gates: Sequence[Gate]) -> list[Gate]:
        """As they are."""
        return list(gates)

    def attached(self) -> AbstractContextManager[None]:
        """The model as it is."""
        return nullcontext()

    def remove(self) -> None:
        """Nothing is there."""

    def learned(self) -> dict[str, Factors]:
        """Nothing."""
        return {}


class Weights(Updates):
    """All parameters are trained, as copies in float32 (Xia et al. 2023, arXiv 2310.06694).

    The model keeps its own: they are the dense model that a KL compares with.

    Args:
        model: the model; its weights are not touched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.places = parameter_places(model)
        self.own = {name: model.get_parameter(name) for name in self.places}
        self.parameters = {
            name: at_least_float32(parameter.detach()).clone().requires_grad_()
            for name, parameter in self.own.items()
        }

    def follow(self, gates: Sequence[Gate]) -> list[Gate]:
        """As they are."""
        return list(gates)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """For the time being modules hold the copies as attributes that hide the parameters."""
        every = [(name, place) for name, places in self.places.items() for place in places]
        kept = [keep_attributes([place.module], place.attribute) for _, place in every]
        with restoring(*kept):
            trained = {name: own.to(self.own[name].dtype) for name, own in self.parameters.items()}
            for name, place in every:
                vars(place.module)[place.attribute] = trained[name]
            yield

    def remove(self) -> None:
        """Nothing is there outside of `attached`."""

    def learned(self) -> dict[str, Factors]:
        """Name of a weight → how much it has changed, in its shape."""
        return {
            name: ((trained - self.own[name]).detach().cpu(),)
            for name, trained in self.parameters.items()
        }


@torch.no_grad()
def merge(model: nn.Module, updates: Mapping[str, Factors]) -> None:
    """Add updates to the weights of these names, in place."""
    for name, factors in updates.items():
        weight = model.get_parameter(name).data
        wide = at_least_float32(weight)
        parts = [factor.to(wide) for factor in factors]
        if len(parts) == 1:
            delta = parts[0]
        else:
            delta = parts[0] @ parts[1]
            transposed = is_transposed(model.get_submodule(name.rpartition(".")[0]))
            delta = delta.T if transposed else delta
        weight.copy_(wide + delta)
