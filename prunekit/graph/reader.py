"""Read the coupled groups off the axes of the parameters, once the rules have run.

Each atom that is left in the axes of parameters gives one group. Index i of the atom is a unit, and
the unit owns all positions, along all these axes, that belong to index i.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from prunekit.graph import axes as ax
from prunekit.graph.axes import DIAGONAL, Atom, Axis
from prunekit.graph.coupling import Extent, Product
from prunekit.graph.groups import CoupledGroup, Kind, Member, ParameterDim
from prunekit.graph.naming import Location, choose_names, locate
from prunekit.graph.operators import Choice, Contraction, Note

# The order of groups whose members are last used by the same operator.
_RANK = ("attention", "mlp", "expert", "query_head", "head_dim", "latent", "channel", "other")


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """What the rules of the operators noted during one forward pass.

    Args:
        tensors: name → axes of every parameter and traced buffer, in the order of first use.
        buffers: which of these names are buffers.
        contractions: axes of weights that are summed over against activations, in order.
        otherwise: the parameters that meet activations in any other way too.
        notes: sizes that modules may keep in attributes.
        folds: axes that two weights are summed over against each other.
        products: for each operator with multiply-adds the axes whose product counts them.
        choices: axes of which the best positions are chosen.
    """

    tensors: Mapping[str, tuple[Axis, ...]]
    buffers: frozenset[str]
    contractions: tuple[Contraction, ...]
    otherwise: frozenset[str]
    notes: tuple[Note, ...]
    folds: tuple[Axis, ...]
    products: tuple[tuple[Axis, ...], ...]
    choices: tuple[Choice, ...]

    def axis(self, place: ParameterDim) -> Axis:
        """The axis at a (parameter, dim)."""
        name, dim = place
        return self.tensors[name][dim]

    @cached_property
    def places(self) -> dict[Atom, list[ParameterDim]]:
        """Atom → every (parameter, dim) whose axis holds it."""
        places: dict[Atom, list[ParameterDim]] = defaultdict(list)
        for name, axes in self.tensors.items():
            for dim, axis in enumerate(axes):
                for atom in dict.fromkeys(ax.atoms(axis)):
                    places[atom].append((name, dim))
        return dict(places)

    @cached_property
    def consumed(self) -> dict[tuple[ParameterDim, Atom], int]:
        """A dim of a parameter, an atom → where in `contractions` the atom is last summed over."""
        last: dict[tuple[ParameterDim, Atom], int] = {}
        for order, contraction in enumerate(self.contractions):
            for atom in ax.atoms(contraction.axis):
                dims = contraction.dims or self._dims_with(atom, contraction.sources)
                last.update({(place, atom): order for place in dims})
        return last

    def _dims_with(self, atom: Atom, names: Container[str]) -> list[ParameterDim]:
        """Every dim of these parameters whose axis holds the atom."""
        return [place for place in self.places.get(atom, ()) if place[0] in names]

    @cached_property
    def contracted(self) -> dict[str, set[int]]:
        """Parameter → its dims that are summed over against activations anywhere."""
        dims: dict[str, set[int]] = defaultdict(set)
        for (name, dim), _ in self.consumed:
            dims[name].add(dim)
        return dict(dims)

    @cached_property
    def attention(self) -> set[Atom]:
        """The atoms that are batch axes of a product with softmax probabilities: heads."""
        return {atom for atom in self.places if "attention" in atom.tags}

    @cached_property
    def beside_attention(self) -> set[Atom]:
        """The atoms that share an axis of a parameter with heads: the width of a head."""
        shared = {place for atom in self.attention for place in self.places[atom]}
        return {atom for place in shared for atom in ax.atoms(self.axis(place))}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Draft:
    """A coupled group without its name, which depends on what the other groups are called."""

    atom: Atom
    location: Location
    kind: Kind
    members: tuple[Member, ...]
    fixed: str | None  # why the group can't be pruned
    parameters_per_unit: int
    order: int
    fewest: int

    def build(self, name: str) -> CoupledGroup:
        """The group under its name."""
        return CoupledGroup(
            name=name,
            kind=self.kind,
            layer=self.location.layer,
            module=self.location.module,
            num_units=self.atom.size,
            members=self.members,
            prunable=self.fixed is None,
            exact=self.fixed is None and self.atom.inexact is None,
            reason=self.fixed or self.atom.inexact,
            parameters_per_unit=self.parameters_per_unit,
            order=self.order,
            fewest=self.fewest,
        )


def read_groups(model: nn.Module, findings: Findings) -> dict[Atom, CoupledGroup]:
    """Read off the coupled groups, in the order in which a forward pass last uses them.

    Returns:
        The atom whose indices are the group's units → the group.
    """
    _mark_scales(findings)
    drafts = [
        _draft(model, findings, atom)
        for atom, places in findings.places.items()
        if atom.size > 1 and any(name not in findings.buffers for name, _ in places)
    ]
    drafts.sort(key=lambda draft: (draft.order, _RANK.index(draft.kind)))
    names = choose_names([(draft.location, draft.kind) for draft in drafts])
    return {draft.atom: draft.build(name) for draft, name in zip(drafts, names, strict=True)}


def read_extents(findings: Findings, groups: Mapping[Atom, CoupledGroup]) -> tuple[Extent, ...]:
    """Tell which positions the units own of each size that a module may keep."""
    extents = []
    for note in findings.notes:
        owned = {}
        for atom in dict.fromkeys(ax.atoms(note.axis)):
            if atom in groups and (owners := ax.owners(note.axis, atom))[0] != DIAGONAL:
                owned[groups[atom].name] = _index_table(owners, atom.size)
        size = ax.axis_size(note.axis)
        extents.append(Extent(module=note.module, quantity=note.quantity, size=size, owned=owned))
    return tuple(extents)


def read_products(findings: Findings, groups: Mapping[Atom, CoupledGroup]) -> tuple[Product, ...]:
    """Add up the multiply-adds that depend on the units of the same groups."""
    counts = Counter[tuple[Atom, ...]]()
    for axes in findings.products:
        counts.update(ax.monomials(axes, groups))
    return tuple(
        Product(count=count, units=tuple(groups[atom].name for atom in atoms))
        for atoms, count in counts.items()
    )


def _mark_scales(findings: Findings) -> None:
    """Mark as inexact the atoms that two weights are summed over to make a scale.

    An atom that is contracted with no activation stays exact: it is the rank of a product of two
    weights, whose value does not change when the atom's zeroed units go from both.
    """
    for atom in (atom for axis in findings.folds for atom in ax.atoms(axis)):
        if any((place, atom) in findings.consumed for place in findings.places[atom]):
            atom.inexact = atom.inexact or "weights are summed over it, for a scale"


def _draft(model: nn.Module, findings: Findings, atom: Atom) -> _Draft:
    places = findings.places[atom]
    members, fixed = [], atom.pinned or _why_grouping(findings, atom)
    for place in places:
        member = _member(findings, atom, place)
        if member is None:
            fixed = fixed or f"its units own uneven parts of {place[0]}"
        else:
            members.append(member)
    location = locate(model, [name for name, _ in places if name not in findings.buffers])
    uses = [findings.consumed[(m.parameter, m.dim), atom] for m in members if m.role == "consumer"]
    return _Draft(
        atom=atom,
        location=location,
        kind=_kind(findings, atom, location.layer),
        members=tuple(members),
        fixed=fixed,
        parameters_per_unit=sum(_numel_of_unit(findings, member) for member in members),
        order=max(uses, default=-1),
        fewest=_fewest(findings, atom),
    )


def _why_grouping(findings: Findings, atom: Atom) -> str | None:
    """Why an atom that counts groups of experts keeps its size; None for any other atom."""
    for axis in map(findings.axis, findings.places[atom]):
        if _grouped(axis, atom):
            return (
                "the router chooses among as many groups of experts; each can lose the same number"
            )
    return None


def _grouped(axis: Axis, atom: Atom) -> bool:
    """Whether an axis lists experts, group by group, and the atom counts the groups."""
    factors = ax.resolve(axis)
    inner = factors[factors.index(atom) + 1 :] if atom in factors else ()
    is_routed = "expert" in atom.tags
    return is_routed and any(isinstance(f, Atom) and "expert" in f.tags for f in inner)


def _fewest(findings: Findings, atom: Atom) -> int:
    """How many of an atom's units must stay so that a router finds as many as it chooses.

    Where it chooses groups of experts first, it finds those of the chosen groups only.
    """
    choices = [(ax.resolve(choice.axis), choice.count) for choice in findings.choices]
    offered = {axis[0]: count for axis, count in choices if len(axis) == 1}
    fewest = 1
    for axis, count in choices:
        if atom not in ax.atoms(axis):
            continue
        owned = int((ax.owners(axis, atom) >= 0).sum())
        positions = owned // atom.size
        for other in axis:
            if other is not atom and other in offered:
                positions = positions * offered[other] // ax.factor_size(other)
        missing = count - (ax.axis_size(axis) - owned)
        fewest = max(fewest, math.ceil(missing / max(positions, 1)))
    return fewest


def _member(findings: Findings, atom: Atom, place: ParameterDim) -> Member | None:
    """The slice of a parameter that the atom's units own; None where they own uneven parts."""
    name, dim = place
    owners = ax.owners(findings.axis(place), atom)
    counts = torch.bincount(owners[owners >= 0], minlength=atom.size)
    if owners[0] == DIAGONAL or len(counts.unique()) != 1:
        return None
    return Member(
        parameter=name,
        dim=dim,
        role="consumer" if (place, atom) in findings.consumed else "producer",
        index=_index_table(owners, atom.size),
        elsewhere=name in findings.otherwise or bool(findings.contracted.get(name, set()) - {dim}),
    )


def _numel_of_unit(findings: Findings, member: Member) -> int:
    """How many parameters of a member one unit owns; none of a buffer."""
    if member.parameter in findings.buffers:
        return 0
    sizes = [ax.axis_size(axis) for axis in findings.tensors[member.parameter]]
    others = math.prod(size for dim, size in enumerate(sizes) if dim != member.dim)
    return member.index.shape[1] * others


def _kind(findings: Findings, atom: Atom, layer: int | None) -> Kind:
    """The kind of an atom's units, by the tags that operators gave it and by its places."""
    places = findings.places[atom]
    if atom in findings.attention:
        return "query_head" if _repeats_heads(findings, atom) else "attention"
    if "expert" in atom.tags:
        return "expert"
    if atom in findings.beside_attention or "head_dim" in atom.tags:
        return "head_dim"
    if "residual" in atom.tags and layer is None:
        return "channel"
    if len(places) == 1:
        return "other"
    if layer is not None and _feeds_heads(findings, atom):
        return "latent"
    if layer is None and any(len(findings.tensors[name]) > 2 for name, _ in places):
        return "channel"  # of a convolution
    return "mlp" if "nonlinear" in atom.tags else "other"


def _feeds_heads(findings: Findings, atom: Atom) -> bool:
    """Whether the atom is summed over to make heads: the rank of their factored projection."""
    for name, dim in findings.places[atom]:
        if ((name, dim), atom) in findings.consumed:
            others = (axis for i, axis in enumerate(findings.tensors[name]) if i != dim)
            if any(other in findings.attention for axis in others for other in ax.atoms(axis)):
                return True
    return False


def _repeats_heads(findings: Findings, atom: Atom) -> bool:
    """Whether key-value heads are repeated along the atom: it counts the queries of each."""
    axes = map(findings.axis, findings.places[atom])
    others = {other for axis in axes for other in ax.atoms(axis)} & findings.attention - {atom}
    return "broadcast" in atom.tags and any("broadcast" not in other.tags for other in others)


def _index_table(owners: Tensor, units: int) -> Tensor:
    """Int64 [units, width]: the positions each unit owns, from the owner of every position.

    Positions that nobody owns (−1) come first in the stable order, and are left out.
    """
    unowned = int((owners < 0).sum())
    return owners.argsort(stable=True)[unowned:].view(units, -1)
