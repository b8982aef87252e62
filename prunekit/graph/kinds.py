"""What the units of an atom are, and what a router demands of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from prunekit.graph import axes as ax
from prunekit.graph.axes import Atom, Axis
from prunekit.graph.findings import Findings
from prunekit.graph.groups import Kind

_GROUPED = "the router chooses groups of experts first; each can lose the same number of experts"

# Parameters of which torch's weight norm, spectral norm and parametrizations make a weight.
_OF_TORCH = re.compile(r"(^|\.)parametrizations\.|_(g|v|orig)$")
_WAY_OUT = (
    "make a plain weight of it first (torch.nn.utils.parametrize.remove_parametrizations, or "
    "torch.nn.utils.remove_weight_norm, remove_spectral_norm)"
)


def find_kind(findings: Findings, atom: Atom, layer_of: Callable[[Atom], int | None]) -> Kind:
    """The kind of an atom's units, by the tags that operators gave it and by its places.

    `layer_of` gives the layer that the places of an atom lie in; None: in several, or in none.
    """
    layer = layer_of(atom)
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
    if layer is not None and any(layer_of(heads) == layer for heads in _heads_of(findings, atom)):
        return "latent"
    if layer is None and any(len(findings.tensors[name]) > 2 for name, _ in places):
        return "channel"  # of a convolution
    return "mlp" if "nonlinear" in atom.tags else "other"


def _repeats_heads(findings: Findings, atom: Atom) -> bool:
    """Whether key-value heads are repeated along the atom: it counts the queries of each."""
    axes = map(findings.axis, findings.places[atom])
    others = {other for axis in axes for other in ax.atoms(axis)} & findings.attention - {atom}
    return "broadcast" in atom.tags and any("broadcast" not in other.tags for other in others)


def _heads_of(findings: Findings, atom: Atom) -> Iterator[Atom]:
    """What counts heads that the atom is summed over to make: it is the rank of their projection.

    So does a residual stream that something looks at head by head (WavLM), in all layers at once.
    """
    for name, dim in findings.places[atom]:
        if ((name, dim), atom) in findings.consumed:
            others = (axis for i, axis in enumerate(findings.tensors[name]) if i != dim)
            yield from {a for axis in others for a in ax.atoms(axis)} & findings.attention


def why_grouping(findings: Findings, atom: Atom) -> str | None:
    """Why an atom that counts groups of experts keeps its size; None for any other atom."""
    for axis in map(findings.axis, findings.places[atom]):
        if _counts_groups(axis, atom):
            return _GROUPED
    return None


def why_computed(findings: Findings, atom: Atom, kind: Kind) -> str | None:
    """Why an atom keeps its size, from all of which weights are computed; None for any other atom.

    Where activations are normalised over it as well, a cut has no masked model to equal, anyway. So
    it is with channels of a class that standardises its own weights (BiT): they may be cut.
    """
    if "computed" not in atom.tags or "mixed" in atom.tags:
        return None
    is_made = any(_OF_TORCH.search(name) for name, _ in findings.places[atom])
    if kind == "channel" and not is_made:
        return None
    reason = f"{atom.inexact}, and weights that stay would change"
    return f"{reason}; {_WAY_OUT}" if is_made else reason


def _counts_groups(axis: Axis, atom: Atom) -> bool:
    """Whether an axis lists experts, group by group, and the atom counts the groups."""
    factors = ax.resolve(axis)
    inner = factors[factors.index(atom) + 1 :] if atom in factors else ()
    is_routed = "expert" in atom.tags
    return is_routed and any(isinstance(f, Atom) and "expert" in f.tags for f in inner)


def find_fewest(findings: Findings, atom: Atom) -> int:
    """How many of an atom's units must stay so that a router finds as many as it chooses."""
    choices = [(ax.resolve(choice.axis), choice.count) for choice in findings.choices]
    fewest = 1
    for axis, count in choices:
        if atom in ax.atoms(axis):
            owned = int((ax.owners(axis, atom) >= 0).sum())
            missing = count - (ax.axis_size(axis) - owned)
            width = owned // atom.size * _share_of_groups(axis, atom, choices)
            fewest = max(fewest, math.ceil(missing / width))
    return fewest


def _share_of_groups(axis: Axis, atom: Atom, choices: Sequence[tuple[Axis, int]]) -> Fraction:
    """The share of an axis that is left once the router has chosen groups of its positions."""
    chosen = {groups[0]: count for groups, count in choices if len(groups) == 1}
    share = Fraction(1)
    for factor in axis:
        if factor is not atom and factor in chosen:
            share *= Fraction(chosen[factor], ax.factor_size(factor))
    return share
