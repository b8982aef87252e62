"""Build a database, and cut a model exactly: one layer-wise walk each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunekit.calibration.observe import Site
from prunekit.graph import Group
from prunekit.importance.base import LayerImportance
from prunekit.runtime.console import say, track
from prunekit.schedules.base import Assignment
from prunekit.schedules.repair import cut_groups, prepare_sites, repair_site, walk_through
from prunekit.search.database import Database
from prunekit.search.shelf import Shelf


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Makes levels as the run's own schedule would make them.

    Attributes:
        assignment: the model, its groups, and the batches that the levels are repaired on.
        damping: of the run's schedule.
        orders: group → its units, the first to go first, where they are scored beforehand; None
            where an importance chooses them layer by layer.
    """

    assignment: Assignment
    damping: float
    orders: Mapping[str, list[int]] | None

    @property
    def walks(self) -> bool:
        """Whether levels take a walk; without one they are masks of units scored beforehand."""
        return self.orders is None or self.assignment.compensation is not None

    @property
    def _chooser(self) -> LayerImportance | None:
        return self.assignment.importance.by_layer if self.orders is None else None

    def cut(self, database: Database, counts: Mapping[str, int]) -> None:
        """Cut the groups by these counts, as an ordinary run would: weights change, no shapes."""
        if not self.walks:
            self._note_masks(database, {name: [count] for name, count in counts.items()})
            database.place(counts)
        elif self.orders is None:
            cut_groups(self.assignment, self.damping, counts=counts)
        else:
            chosen = {name: self.orders[name][:count] for name, count in counts.items()}
            cut_groups(self.assignment, self.damping, chosen=chosen)

    def fill(
        self,
        database: Database,
        levels: Mapping[str, Sequence[int]],
        expected: Mapping[str, int],
        shelf: Shelf | None = None,
    ) -> None:
        """Fill a database; afterwards the model holds the expected levels.

        Args:
            database: it is cleared first.
            levels: group → the numbers of units that are gone at its levels.
            expected: group → the one of these numbers that later groups expect to be gone.
            shelf: where the levels of groups that are finished are kept, and found again.
        """
        database.clear()
        if not self.walks:
            self._note_masks(database, levels)
            database.place(expected)
            return
        groups = [g for g in self.assignment.groups if any(levels.get(g.name, ()))]
        shelf = shelf or Shelf()
        done = {group.name for group in groups if shelf.holds(group.name)}
        walk = walk_through(self.assignment, groups, self._chooser, done)
        for group, sites in track(walk, "levels of all groups", len(groups)):
            if group.name in done:
                shelf.give_back(database, group.name)
            else:
                self._fill_group(database, group, sites, sorted(set(levels[group.name]) - {0}))
                shelf.put_aside(database, group.name)
            database.place({**database.placed, group.name: expected.get(group.name, 0)})
        say(f"levels of {len(groups)} groups: {database.nbytes:,} bytes")

    def _note_masks(self, database: Database, levels: Mapping[str, Sequence[int]]) -> None:
        assert self.orders is not None
        for name, counts in levels.items():
            for count in counts:
                database.note_mask(name, self.orders[name][:count])

    def _fill_group(
        self, database: Database, group: Group, sites: Sequence[Site], counts: Sequence[int]
    ) -> None:
        compensation, chooser = self.assignment.compensation, self._chooser
        chooses = chooser is not None
        work = prepare_sites(group, sites, compensation, self.damping, choosing=chooses)
        if chooser is not None:
            problems = [part.pose_problem() for part in work]
            choices = chooser.choose_levels(problems, counts)
            del problems
        else:
            assert self.orders is not None
            choices = [self.orders[group.name][:count] for count in counts]
        for units in choices:
            if compensation is None:
                database.note_mask(group.name, units)
                continue
            database.reset(group.name)
            for part in work:
                repair_site(part, compensation, units)
            database.note(group.name, units)
        database.reset(group.name)
