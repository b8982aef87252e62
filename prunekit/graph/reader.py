"""Read the coupled groups off the axes of the parameters, once the rules have run.

Each atom that is left in the axes of parameters gives one group. Index i of the atom is a unit, and
the unit owns all positions, along all these axes, that belong to index i.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.graph import axes as ax
from prunekit.graph.axes import DIAGONAL, Atom
from prunekit.graph.coupling import Extent, Product
from prunekit.graph.findings import Findings
from prunekit.graph.groups import CoupledGroup, Kind, Member, ParameterDim
from prunekit.graph.kinds import find_fewest, find_kind, why_computed, why_grouping
from prunekit.graph.naming import Location, choose_names, locate
from prunekit.model.linear import places_of_product
from prunekit.model.ties import Place, parameter_places

_Held = Mapping[str, Sequence[Place]]  # canonical name of a parameter → its places

# The order of groups whose members are last used by the same operator.
_RANK = ("attention", "mlp", "expert", "query_head", "head_dim", "latent", "channel", "other")


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
    held = parameter_places(model)
    drafts = [
        _draft(model, findings, held, atom)
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
        if owned or note.quantity:
            size = ax.axis_size(note.axis)
            extents.append(
                Extent(module=note.module, quantity=note.quantity, size=size, owned=owned)
            )
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
            ax.mark_inexact((atom,), "weights are summed over it, for a scale", weights=True)


def _locate(model: nn.Module, findings: Findings, atom: Atom) -> Location:
    return locate(model, [n for n, _ in findings.places[atom] if n not in findings.buffers])


def _draft(model: nn.Module, findings: Findings, held: _Held, atom: Atom) -> _Draft:
    places = findings.places[atom]
    members, fixed = [], atom.pinned or why_grouping(findings, atom)
    for place in places:
        member = _member(model, findings, held, atom, place)
        if member is None:
            fixed = fixed or f"its units own uneven parts of {place[0]}"
        else:
            members.append(member)
    location = _locate(model, findings, atom)
    kind = find_kind(findings, atom, lambda other: _locate(model, findings, other).layer)
    uses = [findings.consumed[(m.parameter, m.dim), atom] for m in members if m.role == "consumer"]
    return _Draft(
        atom=atom,
        location=location,
        kind=kind,
        members=tuple(members),
        fixed=fixed or why_computed(findings, atom, kind),
        parameters_per_unit=sum(_numel_of_unit(findings, member) for member in members),
        order=max(uses, default=-1),
        fewest=find_fewest(findings, atom),
    )


def _member(
    model: nn.Module, findings: Findings, held: _Held, atom: Atom, place: ParameterDim
) -> Member | None:
    """The slice of a parameter that the atom's units own; None where they own uneven parts."""
    name, dim = place
    owners = ax.owners(findings.axis(place), atom)
    counts = torch.bincount(owners[owners >= 0], minlength=atom.size)
    if owners[0] == DIAGONAL or len(counts.unique()) != 1:
        return None
    consumed = (place, atom) in findings.consumed
    first, *others = findings.tensors[name]
    return Member(
        parameter=name,
        dim=dim,
        role="consumer" if consumed else "producer",
        index=_index_table(owners, atom.size),
        partly=consumed and findings.widest_sum(name, atom) < len(owners),
        elsewhere=name in findings.otherwise or bool(findings.contracted.get(name, set()) - {dim}),
        stacked=len(others) == 2 and any("expert" in own.tags for own in ax.atoms(first)),
        apart=name in held and _is_apart(model, findings, held[name], atom, place),
        reused=findings.is_summed_again(place, atom),
    )


def _is_apart(
    model: nn.Module, findings: Findings, places: Sequence[Place], atom: Atom, place: ParameterDim
) -> bool:
    """Whether an atom is summed over by other modules than those of the parameter's `places`."""
    modules = {model.get_submodule(path) for path in findings.summing_modules(place, atom)}
    return not modules <= {own.module for own in places_of_product(places)}


def _numel_of_unit(findings: Findings, member: Member) -> int:
    """How many parameters of a member one unit owns; none of a buffer."""
    if member.parameter in findings.buffers:
        return 0
    sizes = [ax.axis_size(axis) for axis in findings.tensors[member.parameter]]
    others = math.prod(size for dim, size in enumerate(sizes) if dim != member.dim)
    return member.index.shape[1] * others


def _index_table(owners: Tensor, units: int) -> Tensor:
    """Int64 [units, width]: the positions each unit owns, from the owner of every position.

    Positions that nobody owns (−1) come first in the stable order, and are left out.
    """
    unowned = int((owners < 0).sum())
    return owners.argsort(stable=True)[unowned:].view(units, -1)
