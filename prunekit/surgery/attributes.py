"""Attributes that repeat a size: how they are found, and in which order that is tried.

A module may keep a size in an attribute (`num_heads`, `split_size`) and read it while it runs. When
the weights are cut, the attribute has to follow, and nothing says for certain which attributes do.
`STRATEGIES` lists the ways to find them, those to be trusted most first:

1. by known name: `num_heads` and all its synonyms, of the model's modules around the group;
2. as the tracer noted it: the module that ran an operator may keep a size of that operator;
3. by value: any attribute around the group that holds a size which the cut changes;
4. by value and name: attributes as in 3, but of one name only, one name after another.

An attribute changes only where it holds the old size. The first two strategies are certain enough
to be part of every cut. The others guess: an equal number may mean something else. So a guess is
made only where the cut model without it does not compute the masked model's outputs. All equal
values are tried before one name at a time, because modules that use one foreign name tend to use
several. A guess that turns out not to be needed is taken back (`prunekit.surgery.attempts`).
Attributes that repeat the shape of their module's own weight (`in_features`) need no strategy: they
are set with the weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from prunekit.graph import Group
from prunekit.model.attributes import resize
from prunekit.model.inputs import text_config
from prunekit.model.names import NO_GUESSES, SYNONYMS, hidden_size_of
from prunekit.surgery.changes import Changes
from prunekit.surgery.sizes import CutSizes, outer_path, outer_paths, width_of

Finder = Callable[[CutSizes, Changes], None]  # finds attributes and changes them


class Strategy(ABC):
    """One way to find the attributes that repeat a size."""

    certain: ClassVar[bool]  # part of every cut; other strategies guess

    @abstractmethod
    def finders(self, guessed: Sequence[str]) -> Sequence[Finder]:
        """The finders to try, each in a cut of its own, given the names guessed so far."""


class KnownNames(Strategy):
    """Attributes whose name is known to mean a quantity that a group decides."""

    certain = True

    def finders(self, guessed: Sequence[str]) -> Sequence[Finder]:
        """All known names at once."""
        return (_resize_by_name,)


class NotedSizes(Strategy):
    """Attributes of the modules where the tracer saw an operator use a size, and around them."""

    certain = True

    def finders(self, guessed: Sequence[str]) -> Sequence[Finder]:
        """All noted sizes at once."""
        return (_resize_as_noted,)


class EqualValues(Strategy):
    """Attributes of any name that hold a size which the cut changes."""

    certain = False

    def finders(self, guessed: Sequence[str]) -> Sequence[Finder]:
        """All of them at once."""
        return (_resize_by_value,)


class EqualValuesOfOneName(Strategy):
    """Attributes of one name that hold a size which the cut changes."""

    certain = False

    def finders(self, guessed: Sequence[str]) -> Sequence[Finder]:
        """One for each name that was guessed before, in the order of the alphabet."""
        return [partial(_resize_by_value, only=name) for name in sorted(set(guessed))]


STRATEGIES: tuple[Strategy, ...] = (
    KnownNames(),
    NotedSizes(),
    EqualValues(),
    EqualValuesOfOneName(),
)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The finders of one attempt at a cut, in the order in which they run."""

    finders: tuple[Finder, ...]

    def follow(self, sizes: CutSizes, changes: Changes) -> None:
        """Bring attributes in line with a cut."""
        for finder in self.finders:
            finder(sizes, changes)


def without_guesses() -> Attempt:
    """The attempt that is made first: all certain strategies together."""
    certain = [strategy for strategy in STRATEGIES if strategy.certain]
    return Attempt(finders=tuple(find for strategy in certain for find in strategy.finders(())))


def attempts(guessed: Sequence[str]) -> Iterator[Attempt]:
    """Yield one attempt after another: without guesses first, then with one guess in each.

    Args:
        guessed: names of the attributes that attempts have guessed; read anew for each strategy,
            so that whoever makes the attempts can add to it.
    """
    first = without_guesses()
    yield first
    for strategy in STRATEGIES:
        if not strategy.certain:
            for finder in strategy.finders(guessed):
                yield Attempt(finders=(*first.finders, finder))


def _resize_by_name(sizes: CutSizes, changes: Changes) -> None:
    hidden = hidden_size_of(text_config(sizes.model))

    def set_unless_hidden(target: Any, name: str, value: Any) -> None:
        if name not in SYNONYMS["hidden_size"] or getattr(target, name) != hidden:
            changes.set(target, name, value)

    for name, quantities in sizes.by_group.items():
        # An FFN may be as wide as the residual stream, and one word may mean either width.
        setter = set_unless_hidden if "intermediate_size" in quantities else changes.set
        group = sizes.graph[name]
        owners = {sizes.model.get_submodule(outer_path(m.parameter)) for m in group.members}
        for module in sizes.modules_around(group):
            resize([module], quantities, setter, owner=module in owners)


def _resize_as_noted(sizes: CutSizes, changes: Changes) -> None:
    for path, quantities in sizes.by_module.items():
        paths = (path, *outer_paths(path))
        resize([sizes.model.get_submodule(p) for p in paths], quantities, changes.set)


def _resize_by_value(sizes: CutSizes, changes: Changes, only: str | None = None) -> None:
    """Change every whole number around a group that is a size this cut changes in one way only.

    Nothing is guessed of inexact groups: what the cut model computes can't tell a wrong guess.
    """
    for group in [sizes.graph[name] for name in sizes.removed if sizes.graph[name].exact]:
        values = _changed_values(sizes, group)
        for module in sizes.modules_around(group):
            for attribute, value in list(module.__dict__.items()):
                if only not in (None, attribute) or type(value) is not int:
                    continue
                if attribute in NO_GUESSES and group.kind != "head_dim":
                    continue
                if len(new := values.get(value, set())) == 1:
                    changes.guess(module, attribute, *new)


def _changed_values(sizes: CutSizes, group: Group) -> dict[int, set[int]]:
    """Old size → the new sizes of everything in a group that had this old size."""
    units = sizes.removed[group.name]
    values: dict[int, set[int]] = defaultdict(set)
    values[group.num_units].add(group.num_units - len(units))
    for member in group.members:
        old, new = width_of(sizes.graph, member, sizes.removed)
        values[old].add(new)
    for extent in sizes.graph.extents:
        if group.name in extent.owned:
            values[extent.size].add(extent.after(sizes.removed))
    return values
