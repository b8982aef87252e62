"""The units that were kept: a series for each kind over the layers, and for each other group."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from prunekit.report.record import Report


@dataclass(frozen=True, kw_only=True)
class Units:
    """Units of one kind in a layer, or of one group outside of layers.

    Attributes:
        index: the layer; None outside of layers.
        kind: the kind of the group; its name outside of layers.
        kept: how many stayed.
        total: how many there were.
        planned: the policy's share, scaled as `units` does; None where the report has none.
    """

    index: int | None
    kind: str
    kept: int
    total: int
    planned: float | None = None

    @property
    def share(self) -> float:
        """The share that was kept, in [0, 1]."""
        return self.kept / self.total if self.total else 1.0

    @property
    def removed(self) -> float:
        """The share that was removed, in [0, 1]."""
        return 1 - self.share


def units(report: Report) -> list[Units]:
    """Every entry of the report's layers.

    A policy's shares count only as proportions, the budget scales them; here they are scaled by the
    median of removed / share, which is that scale wherever no limit cut a group's share short.
    """
    shares = report.policy.shares if report.policy else {}
    entries = []
    for layer in report.layers or ():
        planned = _shares_of_kinds(shares, layer.index, list(layer.kinds))
        for kind, own in layer.kinds.items():
            entry = Units(index=layer.index, kind=kind, kept=own.kept, total=own.total)
            entries.append(replace(entry, planned=planned.get(kind)))
    scales = [entry.removed / entry.planned for entry in entries if entry.planned]
    scale = statistics.median(scales) if scales else 1.0
    return [
        entry if entry.planned is None else replace(entry, planned=min(1.0, scale * entry.planned))
        for entry in entries
    ]


def _shares_of_kinds(
    shares: Mapping[str, float], index: int | None, kinds: Sequence[str]
) -> dict[str, float]:
    """Kind → the policy's share of it in one layer.

    Shares are by group. A layer's groups and its kinds come in one order; where a kind has several
    groups the shares must agree.
    """
    if index is None:
        return {kind: shares[kind] for kind in kinds if kind in shares}
    own = [share for name, share in shares.items() if _layer_in(name) == index]
    if len(own) == len(kinds):
        return dict(zip(kinds, own, strict=True))
    return dict.fromkeys(kinds, own[0]) if own and len(set(own)) == 1 else {}


def _layer_in(name: str) -> int | None:
    """The layer of a group, by its name: the first number in the name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def by_kind(entries: Sequence[Units]) -> dict[str, list[Units]]:
    """Kind → its layers, in order; groups outside of layers are left out."""
    kinds: dict[str, list[Units]] = {}
    inside = [entry for entry in entries if entry.index is not None]
    for entry in sorted(inside, key=lambda entry: entry.index or 0):
        kinds.setdefault(entry.kind, []).append(entry)
    return kinds


def outside(entries: Sequence[Units]) -> list[Units]:
    """The groups that lie in no layer."""
    return [entry for entry in entries if entry.index is None]
