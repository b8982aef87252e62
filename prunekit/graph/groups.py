"""Groups: units of one kind at one place, of which some may go.

Most groups are coupled: their units own slices of parameters, and the tracer reads them off the
axes of the weights. A stack of layers is a group too, and its units are whole modules.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from prunekit.errors import TraceError

if TYPE_CHECKING:
    from torch_pruning.dependency import Group as TorchPruningGroup

    from prunekit.graph.coupling import CouplingGraph

Kind = Literal[
    "attention",
    "query_head",
    "mlp",
    "expert",
    "channel",
    "head_dim",
    "latent",
    "layer",
    "other",
]
ParameterDim = tuple[str, int]  # the name of a parameter and one of its dims


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One (parameter, dim) of a group, with the positions along that dim that each unit owns.

    Args:
        parameter: dotted name of the parameter or traced buffer.
        dim: the dim of the parameter that the units lie in.
        role: a consumer's dim is contracted with activations (columns of `o_proj`), a producer's
            dim makes activations (rows of `q_proj`).
        index: int64 [num_units, width].
        elsewhere: whether activations meet the parameter in a use that does not contract this dim:
            the lookup of an embedding tied to the head, the transposed product. A repair for the
            one use would change the other.
        partly: whether every product sums over a part of the dim only, so that there are no inputs
            as wide as it: experts that lie one after another in a matrix.
        apart: whether another module than the linear ones that hold the parameter sums over the
            dim, too: `F.linear(x, a.weight.t())` outside of `a`. The inputs of `a` are no inputs of
            it.
        reused: whether a forward pass sums over the dim more than once: a module that runs again,
            or several that hold the same parameter.
        stacked: whether the parameter is that of stacked experts [experts, rows, columns].
    """

    parameter: str
    dim: int
    role: Literal["producer", "consumer"]
    index: Tensor
    elsewhere: bool = False
    partly: bool = False
    apart: bool = False
    reused: bool = False
    stacked: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What one member adds to a structure: row i of `member.index` belongs to unit `units[i]`.

    `units` is int64 [rows of `member.index`], each unit once.
    """

    member: Member
    units: Tensor


Structure = tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """A module that returns what the consumer of a group makes, so that it goes with the units.

    Args:
        module: its path.
        consumer: the path of the consumer's module inside it; empty where it holds the weight.
        outputs: how many values it returns, the consumer's output first; None where it returns this
            output alone.
    """

    module: str
    consumer: str
    outputs: int | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Group(ABC):
    """Units of one kind at one place that compete with each other.

    Args:
        name: unique in its graph; the key of a plan.
        kind: what a unit is.
        layer: index of the layer the group lies in, None where it lies in none.
        module: path of the innermost module that holds the group.
        num_units: how many units there are.
        prunable: whether units can be removed at all.
        exact: whether the model without a unit computes what the model with that unit zeroed does.
        reason: why the group is not prunable, or not exact.
        parameters_per_unit: how many parameters go with one unit; the mean where units differ.
        members: the slices of parameters that units own, in the order in which a forward pass
            first uses the parameters; empty where units are whole modules.
        must_stay: why at least one unit must stay; None where all of them can go.
        fewest: how many units must stay, so that a router finds as many as it chooses for a token;
            1 where nothing is chosen.
        sublayer: what goes with all units; None where the modules run without any.
        multiple: what the number of units that stay must be a multiple of, for the model to run.
    """

    name: str
    kind: Kind
    layer: int | None
    module: str
    num_units: int
    prunable: bool
    exact: bool
    reason: str | None
    parameters_per_unit: int
    members: tuple[Member, ...] = ()
    must_stay: str | None = "a model needs a layer"
    fewest: int = 1
    sublayer: Sublayer | None = None
    multiple: int = 1

    # Whether the graph's `products` tell what a unit takes part in, so that FLOPs can be counted.
    multiply_adds_known: ClassVar[bool]

    @property
    def consumers(self) -> tuple[Member, ...]:
        """The members whose dim is contracted with activations."""
        return tuple(member for member in self.members if member.role == "consumer")

    @property
    def likeness(self) -> Hashable:
        """A key that is equal for groups which differ in nothing but their layer."""
        return self.kind, self.num_units, re.sub(r"\d+", "*", self.name)

    @property
    @abstractmethod
    def sets_width(self) -> bool:
        """Whether the number of units is the width of a matrix, up to a factor."""

    @property
    @abstractmethod
    def spans_depth(self) -> bool:
        """Whether the group's units concern every layer of the model."""

    @property
    def pattern_names(self) -> set[str]:
        """The names that a pattern of `scope.exclude` may mean the group by.

        They are the group's name, its module, all modules around them, and `_inner_names`.
        """
        names = self._inner_names()
        for path in (self.name, self.module):
            parts = path.split(".")
            names |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
        return names - {""}

    @abstractmethod
    def _inner_names(self) -> set[str]:
        """Names of the modules and parameters that belong to the group or lie inside it."""

    @abstractmethod
    def unit_names(self) -> dict[int, set[str]]:
        """Unit → the names that a pattern may mean this unit alone by; empty where it has none."""

    @abstractmethod
    def scored_members(self, graph: CouplingGraph) -> tuple[Member, ...]:
        """The members whose parameters' scores add up to the scores of the units; no buffers."""

    @abstractmethod
    def structures(self, graph: CouplingGraph) -> tuple[Structure, ...]:
        """The structures W_i of the group (LLM-Pruner, section 3.2), each scored as one."""

    @abstractmethod
    def to_torch_pruning(
        self, model: nn.Module, units: Sequence[int] | None = None
    ) -> TorchPruningGroup:
        """Convert this group, or some of its units, to a torch-pruning group.

        Raises:
            TraceError: the group can't be pruned, or torch-pruning can't cut such units.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class CoupledGroup(Group):
    """Units that own slices of parameters (heads, channels, experts), cut in all members at once.

    `order` tells when a forward pass last contracts activations with one of the members: -1 where
    it never does.
    """

    order: int = 0

    multiply_adds_known: ClassVar[bool] = True

    @property
    def sets_width(self) -> bool:
        """True but for experts, which are counted and not measured."""
        return self.kind != "expert"

    @property
    def spans_depth(self) -> bool:
        """True for channels of the residual stream, which every layer reads and writes."""
        return self.kind == "channel"

    def _inner_names(self) -> set[str]:
        parameters = {member.parameter for member in self.members}
        return parameters | {name.rpartition(".")[0] for name in parameters}

    def unit_names(self) -> dict[int, set[str]]:
        """Slices have no names of their own."""
        return {}

    def scored_members(self, graph: CouplingGraph) -> tuple[Member, ...]:
        """All members but those of buffers."""
        return tuple(member for member in self.members if member.parameter not in graph.buffers)

    def structures(self, graph: CouplingGraph) -> tuple[Structure, ...]:
        """One matrix along one of its dims each; a vector (bias, norm) joins its module's matrix.

        Matrices come first, then the vectors whose module has no matrix of the group.
        """
        structures: dict[ParameterDim, list[Part]] = defaultdict(list)
        units = torch.arange(self.num_units)
        is_vector = {m: len(graph.shapes[m.parameter]) == 1 for m in self.scored_members(graph)}
        for member in sorted(is_vector, key=lambda member: is_vector[member]):
            place = (member.parameter, member.dim)
            if is_vector[member]:
                place = _matrix_beside(member, structures) or place
            structures[place].append(Part(member=member, units=units))
        return tuple(tuple(parts) for parts in structures.values())

    def to_torch_pruning(
        self, model: nn.Module, units: Sequence[int] | None = None
    ) -> TorchPruningGroup:
        """Convert as `prunekit.graph.interop.to_torch_pruning` does."""
        from prunekit.graph.interop import to_torch_pruning

        return to_torch_pruning(self, model, units)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStack(Group):
    """A list of layers that run one after another; its units are whole layers.

    It is found by the name of its `nn.ModuleList`, which is `module`; no axis leads to it, so that
    it has no members.
    """

    kind: Kind = field(default="layer", init=False)
    layer: None = field(default=None, init=False)

    multiply_adds_known: ClassVar[bool] = False

    @property
    def sets_width(self) -> bool:
        """False: layers are counted."""
        return False

    @property
    def spans_depth(self) -> bool:
        """True: the units are the layers."""
        return True

    def _inner_names(self) -> set[str]:
        return {f"{self.module}.{unit}" for unit in range(self.num_units)}

    def unit_names(self) -> dict[int, set[str]]:
        """Each layer by the path of its module, by the stack's name, and by its short index."""
        outer = self.name.rpartition(".")[0]
        return {
            unit: {f"{self.module}.{unit}", f"{self.name}.{unit}", f"{outer}.{unit}".lstrip(".")}
            for unit in range(self.num_units)
        }

    def scored_members(self, graph: CouplingGraph) -> tuple[Member, ...]:
        """Every parameter inside the layers, each as one member of its layer alone.

        `index` is [1, size of dim 0]: the layer owns all of the parameter.
        """
        return tuple(
            Member(parameter=name, dim=0, role="producer", index=torch.arange(shape[0])[None])
            for name, shape in graph.shapes.items()
            if name.startswith(f"{self.module}.") and name not in graph.buffers and shape
        )

    def structures(self, graph: CouplingGraph) -> tuple[Structure, ...]:
        """The parameters of one name in each of the layers."""
        structures: dict[str, list[Part]] = defaultdict(list)
        for member in self.scored_members(graph):
            layer, _, rest = member.parameter[len(self.module) + 1 :].partition(".")
            structures[rest].append(Part(member=member, units=torch.tensor([int(layer)])))
        return tuple(tuple(parts) for parts in structures.values())

    def to_torch_pruning(
        self, model: nn.Module, units: Sequence[int] | None = None
    ) -> TorchPruningGroup:
        """Raise TraceError: torch-pruning cuts channels only."""
        raise TraceError(f"{self.name}: torch-pruning cuts channels, no whole layers")


def sort_by_likeness(groups: Iterable[Group]) -> dict[Hashable, list[Group]]:
    """Likeness → the groups that have it: they differ in nothing but their layer."""
    classes: dict[Hashable, list[Group]] = defaultdict(list)
    for group in groups:
        classes[group.likeness].append(group)
    return dict(classes)


def _matrix_beside(vector: Member, places: Mapping[ParameterDim, object]) -> ParameterDim | None:
    """The first of these places that lies in the vector's module and dim."""
    module = vector.parameter.rpartition(".")[0]
    for parameter, dim in places:
        if parameter.rpartition(".")[0] == module and dim == vector.dim:
            return parameter, dim
    return None


def kept_positions(size: int, removed: Tensor | Sequence[int]) -> Tensor:
    """The positions in [0, size) that are not removed: int64, rising, on the device of those."""
    gone = torch.as_tensor(removed, dtype=torch.long)
    keep = torch.ones(size, dtype=torch.bool, device=gone.device)
    keep[gone] = False
    return keep.nonzero().flatten()
