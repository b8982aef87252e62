"""What the rules of the operators noted during one forward pass, and look-ups in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property

from prunekit.graph import axes as ax
from prunekit.graph.axes import Atom, Axis
from prunekit.graph.groups import ParameterDim
from prunekit.graph.operators import Choice, Contraction, Normed, Note


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
        normed: parameters and an axis of them each position of which is divided by its norm. What
            reads that axis is the norm that the weight is given instead, and not the parameter.
        products: for each operator with multiply-adds the axes whose product counts them.
        choices: axes of which the best positions are chosen.
    """

    tensors: Mapping[str, tuple[Axis, ...]]
    buffers: frozenset[str]
    contractions: tuple[Contraction, ...]
    otherwise: frozenset[str]
    notes: tuple[Note, ...]
    folds: tuple[Axis, ...]
    normed: tuple[Normed, ...]
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
        return {use: orders[-1] for use, orders in self._sums.items()}

    @cached_property
    def _sums(self) -> dict[tuple[ParameterDim, Atom], list[int]]:
        """A dim of a parameter, an atom → everywhere in `contractions` that the atom is summed."""
        normed = {
            (name, atom) for own, axis in self.normed for name in own for atom in ax.atoms(axis)
        }
        sums: dict[tuple[ParameterDim, Atom], list[int]] = defaultdict(list)
        for order, contraction in enumerate(self.contractions):
            for atom in ax.atoms(contraction.axis):
                for place in contraction.dims or self._dims_with(atom, contraction.sources):
                    if (place[0], atom) not in normed:
                        sums[place, atom].append(order)
        return dict(sums)

    def is_summed_again(self, place: ParameterDim, atom: Atom) -> bool:
        """Whether an atom is summed over more than once in a dim of a parameter."""
        return len(set(self._sums.get((place, atom), ()))) > 1

    def summing_modules(self, place: ParameterDim, atom: Atom) -> set[str]:
        """The paths of the modules that sum over an atom in a dim of a parameter, as far known."""
        modules = (self.contractions[order].module for order in self._sums.get((place, atom), ()))
        return {module for module in modules if module is not None}

    def _dims_with(self, atom: Atom, names: Container[str]) -> list[ParameterDim]:
        """Every dim of these parameters whose axis holds the atom."""
        return [place for place in self.places.get(atom, ()) if place[0] in names]

    def widest_sum(self, name: str, atom: Atom) -> int:
        """How many numbers a product with a parameter sums over at most, the atom among them."""
        axes = (c.axis for c in self.contractions if name in c.sources)
        return max((ax.axis_size(axis) for axis in axes if atom in ax.atoms(axis)), default=0)

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
