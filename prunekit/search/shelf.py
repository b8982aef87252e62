"""The shelf: what a round has finished, for a run that was broken off inside of it.

Levels lie in the run's state group by group, judgements call by call. A round that begins again
finds them, in the order in which it made them, and so comes to the same end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prunekit.policies.base import Compute, Keeper, Tools
from prunekit.search.database import Database


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Keeps the work of one round.

    Args:
        tools: the run's, which keep nothing where it has no state.
        name: of the round.
    """

    tools: Tools = field(default_factory=Tools)
    name: str = ""

    def holds(self, group: str) -> bool:
        """Whether the levels of a group are kept."""
        return self._keeper is not None and self._keeper.has_tensors(f"{self.name}/{group}")

    def put_aside(self, database: Database, group: str) -> None:
        """Keep the levels of a group."""
        if self._keeper is not None:
            self._keeper.save_tensors(f"{self.name}/{group}", database.describe(group))

    def give_back(self, database: Database, group: str) -> None:
        """Give the database the levels of a group that are kept."""
        assert self._keeper is not None
        database.restore(group, self._keeper.load_tensors(f"{self.name}/{group}"))

    def remember(self, step: str, compute: Compute) -> dict[str, Any]:
        """The result of a step of the round, computed or found."""
        return self.tools.remember(f"{self.name}-{step}", compute)

    def clear(self) -> None:
        """Let go of the levels, once the round is over; its other steps are small."""
        if self._keeper is not None:
            self._keeper.drop_tensors(self.name)

    @property
    def _keeper(self) -> Keeper | None:
        return self.tools.keeper
