"""What is trained beside the gates: nothing, low-rank updates (`adapters`), or all weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from prunekit.gates.places import Gate, spread, units_along
from prunekit.graph import CouplingGraph
from prunekit.graph.groups import kept_positions
from prunekit.model.ties import parameter_places
from prunekit.model.updates import Factors, is_transposed
from prunekit.runtime.modes import keep_attributes, restoring
from prunekit.runtime.numbers import at_least_float32
from prunekit.surgery.masking import members_to_zero


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


def cut_factors(
    model: nn.Module,
    graph: CouplingGraph,
    updates: Mapping[str, Factors],
    removed: Mapping[str, list[int]],
    scales: Mapping[str, Tensor],
) -> dict[nn.Module, Factors]:
    """Low-rank updates as a cut leaves their weights: module → U [out, r] and V [r, in].

    Args:
        model: the model, not cut yet.
        graph: its coupling graph.
        updates: name of a weight → U and V of the whole weight.
        removed: group → the units that go.
        scales: group → factors [num_units], which are folded into the weights that read them.
    """
    factors = {name: list(own) for name, own in updates.items() if len(own) == 2}
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in factors}
    gone: dict[tuple[str, bool], list[Tensor]] = {}
    for name in {*removed, *scales}:
        for member in graph[name].members:
            if member.parameter in factors:
                inputs = (member.dim == 1) != is_transposed(modules[member.parameter])
                positions = member.index[removed.get(name, [])].flatten()
                gone.setdefault((member.parameter, inputs), []).append(positions)
        for member in members_to_zero(graph[name], graph) if name in scales else ():
            if member.parameter in factors:
                inputs = (member.dim == 1) != is_transposed(modules[member.parameter])
                owner = units_along(member, model.get_parameter(member.parameter)).cpu()
                own = factors[member.parameter]
                along = spread(scales[name], owner).to(own[inputs])
                own[inputs] = own[inputs] * (along if inputs else along[:, None])
    for (name, inputs), parts in gone.items():
        own = factors[name]
        kept = kept_positions(own[inputs].shape[inputs], torch.cat(parts))
        own[inputs] = own[inputs].index_select(int(inputs), kept)
    return {modules[name]: tuple(own) for name, own in factors.items()}
