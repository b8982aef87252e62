"""The structures W_i of a group (LLM-Pruner, section 3.2): the slices of one matrix along one of
its dims.
"""

import re
from collections.abc import Hashable

import torch

from prunekit.graph import CoupledGroup, CouplingGraph, Member

Place = tuple[str, int]


def members_of(graph: CouplingGraph, group: CoupledGroup) -> tuple[Member, ...]:
    """A group's members; of a stack of layers, every parameter inside them, each as one member of
    its layer alone.
    """
    if group.kind != "layer":
        return group.members
    inside = [
        name
        for name in graph.shapes
        if name.startswith(f"{group.module}.") and name not in graph.buffers
    ]
    return tuple(
        Member(
            parameter=name, dim=0, role="producer", index=torch.arange(graph.shapes[name][0])[None]
        )
        for name in inside
        if graph.shapes[name]
    )


def alike(group: CoupledGroup) -> Hashable:
    """What groups have in common that differ in nothing but their layer."""
    return group.kind, group.num_units, re.sub(r"\d+", "*", group.name)
