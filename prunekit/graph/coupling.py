"""The coupling graph: all groups of a model, and the sizes that a cut of them changes."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.errors import TraceError, suggest
from prunekit.graph.groups import CoupledGroup, Group, LayerStack, ParameterDim
from prunekit.model.ties import names_after

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True, kw_only=True, eq=False)
class Extent:
    """A size that a module may keep in an attribute while it runs.

    Args:
        module: path of the module.
        quantity: the name of the size, such as a convolution's `groups` or the width of a head;
            empty where the operator (a reshape, a split) doesn't tell what the size means.
        size: its value in the uncut model.
        owned: name of a group → int64 [num_units, width], the positions of that size that each
            unit owns.
    """

    module: str
    quantity: str
    size: int
    owned: Mapping[str, Tensor]

    def after(self, removed: Mapping[str, list[int]]) -> int:
        """The size once these units (name of a group → unit indices) are gone."""
        gone = [
            index[removed[name]].flatten()
            for name, index in self.owned.items()
            if removed.get(name)
        ]
        return self.size - (len(torch.cat(gone).unique()) if gone else 0)


@dataclass(frozen=True, kw_only=True)
class Product:
    """Multiply-adds of a forward pass on the example: `count` · Π of the units kept of `units`.

    `units` holds names of groups; a name that stands there twice counts squared.
    """

    count: int
    units: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class CouplingGraph:
    """All groups of a model.

    Args:
        groups: the coupled groups, in the order in which they run.
        shapes: name → shape of every parameter (tied ones once) and of every traced buffer.
        buffers: which of these names are buffers.
        extents: the sizes that modules may keep in attributes.
        products: the multiply-adds of a forward pass on the example, as far as the rules of the
            operators tell.
        example_inputs: the inputs that the model was traced with; a cut is checked on them.
        stacks: the lists of layers of which whole layers can be dropped.
        aliases: canonical name of a shared tensor → all its names.
    """

    groups: tuple[CoupledGroup, ...]
    shapes: dict[str, tuple[int, ...]]
    buffers: frozenset[str]
    extents: tuple[Extent, ...] = ()
    products: tuple[Product, ...] = ()
    example_inputs: Mapping[str, Any] | tuple[Any, ...] = ()
    stacks: tuple[LayerStack, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Group]:
        """Name → group, the stacks among them."""
        return {group.name: group for group in (*self.groups, *self.stacks)}

    def __getitem__(self, name: str) -> Group:
        if name not in self.by_name:
            raise TraceError(f"no group is called {name!r}: {suggest(name, list(self.by_name))}")
        return self.by_name[name]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the shapes and of the coupled groups' index tables: 16 hexadecimal digits.

        A plan removes the same positions in all graphs with the same fingerprint.
        """
        digest = hashlib.sha256(repr(sorted(self.shapes.items())).encode())
        for group in self.groups:
            digest.update(f"{group.name} {group.num_units}".encode())
            for member in group.members:
                digest.update(f"{member.parameter} {member.dim}".encode())
                digest.update(member.index.numpy().tobytes())
        return digest.hexdigest()[:16]

    def num_parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(
            math.prod(shape) for name, shape in self.shapes.items() if name not in self.buffers
        )

    def names_after(self, removed: Mapping[str, list[int]]) -> dict[str, str]:
        """Names of parameters and traced buffers → their names once whole layers are gone.

        Tensors that go with the layers are left out.
        """
        dropped = {
            stack.module: removed[stack.name] for stack in self.stacks if removed.get(stack.name)
        }
        if not dropped:
            return {name: name for name in self.shapes}
        return names_after(self.shapes, self.aliases, dropped)

    def removed_parameters(self, removed: Mapping[str, list[int]]) -> int:
        """How many parameters go with these units (name of a group → unit indices).

        A parameter that several units own is counted once.
        """
        left = self.names_after(removed)
        # Name of a tensor that loses anything → the sizes that stay; [0] in a dropped layer.
        kept: dict[str, list[int]] = {name: [0] for name in self.shapes.keys() - left.keys()}
        for (parameter, dim), positions in self.positions(removed).items():
            if parameter in left:
                sizes = kept.setdefault(parameter, list(self.shapes[parameter]))
                sizes[dim] -= len(positions)
        return sum(
            math.prod(self.shapes[name]) - math.prod(sizes)
            for name, sizes in kept.items()
            if name not in self.buffers
        )

    def positions(self, removed: Mapping[str, list[int]]) -> dict[ParameterDim, set[int]]:
        """(parameter, dim) → the positions along the dim that these units own."""
        positions: dict[ParameterDim, set[int]] = defaultdict(set)
        for name, units in removed.items():
            for member in self[name].members if units else ():
                owned = member.index[units].flatten().tolist()
                positions[member.parameter, member.dim].update(owned)
        return positions

    def to_networkx(self) -> networkx.Graph:
        """A bipartite graph: groups on one side, (parameter, dim) on the other.

        Its edges carry the member's role and width.
        """
        import networkx

        graph = networkx.Graph()
        for group in self.groups:
            graph.add_node(
                group.name,
                type="group",
                kind=group.kind,
                units=group.num_units,
                prunable=group.prunable,
            )
            for member in group.members:
                node = f"{member.parameter}[{member.dim}]"
                graph.add_node(node, type="member", parameter=member.parameter, dim=member.dim)
                graph.add_edge(group.name, node, role=member.role, width=member.index.shape[1])
        return graph
